"""MXFP4: two E2M1 codes in a byte and one E8M0 byte per 32 inputs.

    w[r, c] = value(nibble) * 2^(scale[r, c // 32] - 127)                     the low nibble is the even column

    weight_packed U8 [out, in/2]  + weight_scale U8 [out, in/32]          compressed-tensors, our own releases
    weight        U8 [out, in/2]  + weight_scale U8                       Quark
    weight        I8 [out, in/2]  + scale        F8_E8M0                  DeepSeek-V4
    *_blocks      U8 [experts, out, in/32, 16] + *_scales U8 [experts, out, in/32]      gpt-oss

E8M0 scales may be U8 or F8_E8M0 under any of these names.
"""

from __future__ import annotations

import math

from stages.dialects.claim import Claim
from stages.dialects.fp8 import E8M0, static_scale
from stages.errors import UserError

NAME = "mxfp4"
LABEL, CAN_STAY, IS_COARSE = "MXFP4 weights", False, False
TILE = (1, 32)
METHODS = ("compressed-tensors", "mxfp4", "quark", "fp8")  # fp8: experts in MXFP4 among FP8 linears (DeepSeek-V4)
LAYOUTS = (  # suffix of the codes, their dtype, suffix of the scale
    ("weight_packed", "U8", "weight_scale"), ("weight", "U8", "weight_scale"), ("weight", "I8", "scale"), ("_blocks", "U8", "_scales"),
)


def claim(name, info, tensors, shard_of, config):
    """Claims packed weights beside E8M0 scales."""
    for suffix, dtype, scale_suffix in LAYOUTS:
        scale_name = name.removesuffix(suffix) + scale_suffix
        if not name.endswith(suffix) or info.dtype != dtype or scale_name not in tensors or tensors[scale_name].dtype not in E8M0:
            continue
        blocks = suffix == "_blocks"
        rank = len(info.shape) - blocks
        columns = 2 * math.prod(info.shape[2 if blocks else -1:]) if info.shape else 0
        matrix = (*info.shape[:2], columns) if blocks else (*info.shape[:-1], columns)
        expected = (*matrix[:-1], columns // 32)
        if rank not in (2, 3) or columns % 32 or (blocks and info.shape[-1] != 16) or tensors[scale_name].shape != expected:
            raise UserError(f"{shard_of[scale_name]}: scale {scale_name} is {tensors[scale_name].dtype} {list(tensors[scale_name].shape)}, but "
                            f"blocks of 32 inputs cut {name} {info.dtype} {list(info.shape)} into {list(expected)}; one of them is of another "
                            "checkpoint")
        return Claim(NAME, scale_name, TILE, matrix, static_scale(name, tensors))
    return None


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Decoded rows."""
    from kernels.formats import decode_mxfp4

    return decode_mxfp4(tensors.matrix_rows(name, expert, begin, end, buffer), tensors.matrix_rows(claim.scale, expert, begin, end)).numpy(), None
