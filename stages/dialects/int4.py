"""INT4 of compressed-tensors (pack-quantized): eight codes in an int32, one float scale per group of inputs.

    w[r, c] = (code[r, c] - zero[r, g]) * float32(weight_scale[r, g])          g = c // group size; zero = 0 where symmetric

Zero points are packed like the codes, along the rows. Eight-bit codes and activation order are refused.
"""

from __future__ import annotations

import math

from stages.dialects.block_fp8 import FLOATS, declared_weights
from stages.dialects.claim import Claim
from stages.errors import UserError

NAME = "int4"
METHODS = ("compressed-tensors",)


def claim(name, info, tensors, where, config):
    """Claims packed int32 weights, their scales, shapes and zero points."""
    stem = name.removesuffix("_packed")
    scale = tensors.get(f"{stem}_scale")
    if not name.endswith("weight_packed") or info.dtype != "I32":
        return None
    if scale is None or scale.dtype not in FLOATS:
        raise UserError(f"{where[name]}: packed INT4 weight {name} has no float scale {stem}_scale in any shard; without it its values "
                        "are unknown, get the complete checkpoint")
    weights = next((weights for weights in declared_weights(config) if weights.get("type") == "int"), {})
    if weights.get("num_bits", 4) != 4 or f"{stem}_g_idx" in tensors:
        raise UserError(f"{where[name]}: {name} has {weights.get('num_bits')} bits" + (" and an activation order" if f"{stem}_g_idx" in
                        tensors else "") + "; of pack-quantized weights only those with 4 bits in their own order are read")
    if len(info.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != info.shape[0] or not scale.shape[1]:
        raise UserError(f"{where[name]}: {name} is I32 {list(info.shape)} and {stem}_scale {list(scale.shape)}; they do not fit")
    group = weights.get("group_size")
    columns = scale.shape[1] * group if group and group > 0 else 8 * info.shape[1]
    if math.ceil(columns / 8) != info.shape[1] or columns % scale.shape[1]:
        raise UserError(f"{where[name]}: {name} holds up to {8 * info.shape[1]} columns, but {stem}_scale {list(scale.shape)} and groups of "
                        f"{group} (config.json) mean {columns}; one of them is of another checkpoint")
    parts = {kind: f"{stem}_{kind}" for kind in ("shape", "zero_point") if f"{stem}_{kind}" in tensors}
    return Claim(NAME, f"{stem}_scale", (1, columns // scale.shape[1]), (info.shape[0], columns), parts)


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Decoded rows. UserError where `weight_shape`, which only the data tells, is another than the header's."""
    from kernels.formats import decode_int4, unpack_int4

    out, columns = claim.matrix
    if "shape" in claim.parts and (shape := tensors.tensor(claim.parts["shape"]).tolist()) != [out, columns]:
        raise UserError(f"{claim.parts['shape']}: says {shape}, but {name} and {claim.scale} are those of {[out, columns]}; the checkpoint "
                        "is damaged")
    zero = None
    if "zero_point" in claim.parts:
        zero = tensors.tensor(claim.parts["zero_point"])
        zero = unpack_int4(zero.T.contiguous(), out).T[begin:end] if zero.element_size() == 4 else zero[begin:end]
    return decode_int4(tensors.matrix_rows(name, expert, begin, end, buffer), tensors.matrix_rows(claim.scale, expert, begin, end),
                       columns, zero), None
