"""FP8 with one float scale per output channel or per tensor, `weight_scale` (compressed-tensors float-quantized).

    w[r, c] = float32(weight[r, c]) * float32(weight_scale[r])        [out, 1], or one element for the whole tensor

The suffix alone does not say what it is: U8 scales of the same name are MXFP8, so dtype and shape decide.
"""

from __future__ import annotations

from stages.dialects.block_fp8 import SCALE_DTYPES, declared
from stages.errors import UserError

NAME = "channel_fp8"
SUFFIX = "_scale"


def claim(name, info, tensors, where, config):
    """Claims FP8 weights beside a float `weight_scale`, and those scales."""
    weight = tensors.get(name.removesuffix(SUFFIX))
    if name.endswith(SUFFIX) and info.dtype in SCALE_DTYPES and weight is not None and weight.dtype == "F8_E4M3":
        return NAME, None, None
    scale = tensors.get(name + SUFFIX)
    if info.dtype != "F8_E4M3" or scale is None or scale.dtype not in SCALE_DTYPES:
        return None
    per_channel, per_tensor = (*info.shape[:-1], 1), len(info.shape) == 2 and scale.shape in ((), (1,), (1, 1))
    if len(info.shape) < 2 or not (scale.shape == per_channel or per_tensor):
        raise UserError(f"{where[name + SUFFIX]}: scale {name + SUFFIX} has shape {list(scale.shape)}; for {name} of shape "
                        f"{list(info.shape)} one scale per channel is {list(per_channel)} and one per tensor [1]; the scale "
                        "is of another checkpoint or of a dialect that is not read")
    return NAME, name + SUFFIX, (1, info.shape[-1])


def check_config(names, config) -> None:
    """config.json must declare compressed-tensors."""
    method = declared(config).get("quant_method")
    if names and method != "compressed-tensors":
        raise UserError(f"config.json declares quant_method {method!r}, but the headers hold {len(names)} FP8 weights and "
                        f"scales (per channel or tensor), {names[0]} first; restore the original config.json")
