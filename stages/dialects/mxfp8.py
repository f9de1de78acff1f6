"""MXFP8: float8_e4m3fn codes and one E8M0 byte (U8) per 32 inputs, as `weight_scale_inv` (MiniMax) or `weight_scale`.

    w[r, c] = float32(weight[r, c]) * 2^(scale[r, c // 32] - 127)
"""

from __future__ import annotations

from stages.dialects.block_fp8 import declared
from stages.errors import UserError

NAME = "mxfp8"
TILE = (1, 32)
SUFFIXES = ("_scale_inv", "_scale")
METHODS = ("mxfp8", "compressed-tensors", "modelopt")


def claim(name, info, tensors, where, config):
    """Claims FP8 weights whose scale is U8, and those scales."""
    for suffix in SUFFIXES:
        weight = tensors.get(name.removesuffix(suffix))
        if name.endswith(suffix) and info.dtype == "U8" and weight is not None and weight.dtype == "F8_E4M3":
            return NAME, None, None
        scale = tensors.get(name + suffix)
        if info.dtype != "F8_E4M3" or scale is None or scale.dtype != "U8":
            continue
        expected = (*info.shape[:-1], -(-info.shape[-1] // TILE[1]))
        if len(info.shape) < 2 or scale.shape != expected:
            raise UserError(f"{where[name + suffix]}: scale {name + suffix} is U8 {list(scale.shape)}, but blocks of 32 inputs "
                            f"cut {name} of shape {list(info.shape)} into {list(expected)}; the scale is of another checkpoint")
        return NAME, name + suffix, TILE
    return None


def check_config(names, config) -> None:
    """config.json must declare a method that stores MXFP8."""
    method = declared(config).get("quant_method")
    if names and method not in METHODS:
        raise UserError(f"config.json declares quant_method {method!r}, but the headers hold {len(names)} MXFP8 weights and "
                        f"scales, {names[0]} first; restore the original config.json")
