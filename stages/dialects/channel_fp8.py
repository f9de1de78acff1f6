"""FP8 with one float scale per output channel or per tensor, `weight_scale` (compressed-tensors float-quantized, ModelOpt, AutoFP8,
Quark); per tensor `weight_scale_inv`, too, where transformers wrote it, which multiplies nevertheless.

    w[r, c] = float32(weight[r, c]) * float32(weight_scale[r])        [out, 1] or [out], or one element for the whole tensor

The suffix alone does not say what it is: U8 scales of the same name are MXFP8, so dtype and shape decide. AutoFP8 declares
quant_method fp8 and has one scale per tensor.
"""

from __future__ import annotations

from stages.checkpoint.header import FLOATS
from stages.dialects import fp8
from stages.dialects.claim import Claim
from stages.dialects.config import declared
from stages.errors import UserError

NAME = "channel_fp8"
LABEL, CAN_STAY, IS_COARSE = "FP8 weights with a scale per channel or tensor", True, False
METHODS = ("compressed-tensors", "modelopt", "modelopt_mixed", "fp8", "quark")


def claim(name, info, tensors, shard_of, config):
    """Claims FP8 weights beside a float `weight_scale`, and the scale of activations where there is one; block_fp8 leaves the other spelling to it."""
    scale_name = next((scale for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in tensors), None)
    scale = tensors.get(scale_name)
    if info.dtype != "F8_E4M3" or scale is None or scale.dtype not in FLOATS:
        return None
    found = fp8.granularity(info.shape, scale.shape)
    if found is None:
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has shape {list(scale.shape)}; for {name} of shape "
                        f"{list(info.shape)} one scale per channel is {[*info.shape[:-1], 1]} and one per tensor [1]; the scale "
                        "is of another checkpoint or of a dialect that is not read")
    if found == "channel" and declared(config).get("quant_method") == "fp8":
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has shape {list(scale.shape)}, one per channel, which config.json's "
                        "quant_method 'fp8' does not have; the scale or config.json is of another checkpoint")
    return Claim(NAME, scale_name, (1, info.shape[-1]), info.shape, fp8.static_scale(name, tensors), one_scale=found == "tensor")


rows = fp8.rows
