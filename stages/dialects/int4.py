"""INT4 of compressed-tensors (pack-quantized): eight codes in an int32, one float scale per group of inputs.

    w[r, c] = (code[r, c] - zero[r, g]) * float32(weight_scale[r, g])          g = c // group size; zero = 0 where symmetric

Zero points are packed like the codes, along the rows. Eight-bit codes and activation order are refused.
"""

from __future__ import annotations

import math

from stages.checkpoint.header import FLOATS
from stages.dialects.claim import Claim
from stages.dialects.config import declared_weights
from stages.dialects.fp8 import static_scale
from stages.errors import UserError

NAME = "int4"
LABEL, CAN_STAY, IS_COARSE = "INT4 weights", False, True
METHODS = ("compressed-tensors",)


def claim(name, info, tensors, shard_of, config):
    """Claims packed int32 weights, their scales, shapes and zero points."""
    stem = name.removesuffix("_packed")
    scale = tensors.get(f"{stem}_scale")
    if not name.endswith("weight_packed") or info.dtype != "I32":
        return None
    if scale is None:
        raise UserError(f"{shard_of[name]}: packed INT4 weight {name} has no float scale {stem}_scale in any shard; without it its values "
                        "are unknown, get the complete checkpoint")
    if scale.dtype not in FLOATS:
        return None
    weights = _arguments(name, shard_of, config)
    if f"{stem}_g_idx" in tensors:
        raise UserError(f"{shard_of[name]}: {name} has an activation order, {stem}_g_idx; of pack-quantized weights only those "
                        "in their own order are read; get the checkpoint in BF16 or FP8")
    if len(info.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != info.shape[0] or not (scale.shape[1] and all(info.shape)):
        raise UserError(f"{shard_of[name]}: {name} is I32 {list(info.shape)} and {stem}_scale {list(scale.shape)}; they do not fit, download both "
                        "shards again")
    group = weights.get("group_size") or 0
    columns = scale.shape[1] * group if group > 0 else 8 * info.shape[1]
    if math.ceil(columns / 8) != info.shape[1] or columns % scale.shape[1]:
        raise UserError(f"{shard_of[name]}: {name} holds up to {8 * info.shape[1]} columns, but {stem}_scale {list(scale.shape)} and groups of "
                        f"{group} (config.json) mean {columns}; config.json or one of them is of another checkpoint")
    zero, groups = tensors.get(f"{stem}_zero_point"), scale.shape
    if zero is None and weights.get("symmetric") is False:
        raise UserError(f"{shard_of[name]}: config.json says that INT4 is not symmetric, but {name} has no {stem}_zero_point; the "
                        "checkpoint is incomplete, download it again with its own config.json")
    if zero is not None and (zero.dtype, zero.shape) not in (("I32", (math.ceil(groups[0] / 8), groups[1])), ("I8", groups)):
        raise UserError(f"{shard_of[f'{stem}_zero_point']}: {stem}_zero_point is {zero.dtype} {list(zero.shape)}, expected I32 "
                        f"{[math.ceil(groups[0] / 8), groups[1]]} or I8 {list(groups)}; download the shard again")
    parts = {kind: f"{stem}_{kind}" for kind in ("shape", "zero_point") if f"{stem}_{kind}" in tensors} | static_scale(name, tensors)
    return Claim(NAME, f"{stem}_scale", (1, columns // scale.shape[1]), (info.shape[0], columns), parts)


def _arguments(name, shard_of, config) -> dict:
    """What config.json says of INT4 weights; UserError where it says several things, or another number of bits."""
    found = [weights for weights in declared_weights(config) if weights.get("type", "int") == "int" and weights]
    keys = {(weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")) for weights in found}
    if len(keys) > 1:
        raise UserError(f"{shard_of[name]}: config.json has integer groups of several kinds (bits, group size, symmetric: "
                        f"{', '.join(map(str, sorted(keys, key=str)))}), so that {name} could be either; get the checkpoint in BF16 or FP8")
    weights = found[0] if found else {}
    if weights.get("num_bits", 4) != 4:
        raise UserError(f"{shard_of[name]}: {name} has {weights['num_bits']} bits by config.json; of pack-quantized weights only those with 4 are "
                        "read; get the checkpoint in BF16 or FP8")
    return weights


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
        if bool(((zero < -8) | (zero > 7)).any()):
            raise UserError(f"{claim.parts['zero_point']}: holds a zero point outside of -8 to 7; the checkpoint is damaged")
    return decode_int4(tensors.matrix_rows(name, expert, begin, end, buffer), tensors.matrix_rows(claim.scale, expert, begin, end),
                       columns, zero).numpy(), None
