"""MXFP8: float8_e4m3fn codes and one E8M0 byte (U8 or F8_E8M0) per 32 inputs, as `weight_scale_inv` (MiniMax) or `weight_scale`.

    w[r, c] = float32(weight[r, c]) * 2^(scale[r, c // 32] - 127)
"""

from __future__ import annotations

from stages.dialects import fp8
from stages.dialects.claim import Claim
from stages.errors import UserError

NAME = "mxfp8"
LABEL, CAN_STAY, IS_COARSE = "MXFP8 weights", True, False
TILE = fp8.MICROSCALED
METHODS = ("mxfp8", "compressed-tensors", "modelopt", "modelopt_mixed")


def claim(name, info, tensors, shard_of, config):
    """Claims FP8 weights whose scale is E8M0; block_fp8 comes first and takes those of tiles."""
    scale_name = next((candidate for candidate in fp8.scale_of(name) if candidate in tensors), None)
    if info.dtype != "F8_E4M3" or scale_name is None or tensors[scale_name].dtype not in fp8.E8M0:
        return None
    scale = tensors[scale_name]
    if not fp8.is_microscaled(info.shape, scale.shape):
        expected = [*info.shape[:-1], -(-info.shape[-1] // TILE[1])] if info.shape else []
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} is {scale.dtype} {list(scale.shape)}, but blocks of 32 inputs "
                        f"cut {name} of shape {list(info.shape)} into {expected}; the scale is of another checkpoint, or config.json does not "
                        "declare the tiles that it is of")
    return Claim(NAME, scale_name, TILE, info.shape, fp8.static_scale(name, tensors))


rows = fp8.rows
