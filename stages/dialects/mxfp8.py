"""MXFP8: float8_e4m3fn codes and one E8M0 byte (U8) per 32 inputs, as `weight_scale_inv` (MiniMax) or `weight_scale`.

    w[r, c] = float32(weight[r, c]) * 2^(scale[r, c // 32] - 127)
"""

from __future__ import annotations

from stages.dialects import block_fp8
from stages.dialects.block_fp8 import scale_of, static_scale
from stages.dialects.claim import Claim
from stages.errors import UserError

NAME = "mxfp8"
TILE = (1, 32)
METHODS = ("mxfp8", "compressed-tensors", "modelopt", "modelopt_mixed")


def claim(name, info, tensors, where, config):
    """Claims FP8 weights whose scale is U8."""
    scale_name = next((candidate for candidate in scale_of(name) if candidate in tensors), None)
    if info.dtype != "F8_E4M3" or scale_name is None or tensors[scale_name].dtype != "U8":
        return None
    scale = tensors[scale_name]
    expected = (*info.shape[:-1], -(-info.shape[-1] // TILE[1])) if info.shape else ()
    if len(info.shape) < 2 or scale.shape != expected:
        raise UserError(f"{where[scale_name]}: scale {scale_name} is U8 {list(scale.shape)}, but blocks of 32 inputs "
                        f"cut {name} of shape {list(info.shape)} into {list(expected)}; the scale is of another checkpoint")
    return Claim(NAME, scale_name, TILE, info.shape, static_scale(name, tensors))


rows = block_fp8.rows
