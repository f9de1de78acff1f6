"""Block FP8: float8_e4m3fn codes and one float scale per tile, `weight` beside `weight_scale_inv`.

    w[r, c] = float32(weight[r, c]) * float32(weight_scale_inv[r // tile_rows, c // tile_columns])

Despite its name the stored scale multiplies. 2D and 3D (experts first) are the same, the last two dimensions count;
edges may be ragged. The tile is what config.json declares (128x128 when it is silent), and the two shapes must agree
with it: a disagreement names both instead of guessing.
"""

from __future__ import annotations

from stages.errors import UserError

NAME = "block_fp8"
SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16")


def declared(config: dict) -> dict:
    """The quantization_config, at the top or in text_config; empty where there is none."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def claim(name, info, tensors, where, config):
    """Claims FP8 weights that have a scale, and those scales."""
    if name.endswith(SUFFIX) and info.dtype in SCALE_DTYPES:
        weight = tensors.get(name.removesuffix(SUFFIX))
        if weight is None:
            raise UserError(f"{where[name]}: scale {name} has no weight {name.removesuffix(SUFFIX)} in any shard; the "
                            "checkpoint is incomplete, download it again")
        if weight.dtype == "F8_E4M3":
            return NAME, None, None
    if info.dtype != "F8_E4M3":
        return None
    scale_name = name + SUFFIX
    scale = tensors.get(scale_name)
    other = scale or tensors.get(name + "_scale")
    if other is not None and (scale is None or scale.dtype == "U8"):
        return None  # MXFP8, or scales per channel or tensor
    if scale is None:
        raise UserError(f"{where[name]}: FP8 tensor {name} has no scale {scale_name} in any shard; without it its values "
                        "are unknown, get the complete checkpoint")
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{where[scale_name]}: scale {scale_name} has dtype {scale.dtype}, expected one of "
                        f"{', '.join(SCALE_DTYPES)}; this is another dialect than block FP8 and is not read yet")
    tile = tuple(int(edge) for edge in declared(config).get("weight_block_size") or (128, 128))
    expected = (*info.shape[:-2], *(-(-size // edge) for size, edge in zip(info.shape[-2:], tile)))
    if len(info.shape) < 2 or scale.shape != expected:
        raise UserError(f"{where[scale_name]}: scale {scale_name} has shape {list(scale.shape)}, but tiles of "
                        f"{list(tile)} (config.json) cut {name} of shape {list(info.shape)} into {list(expected)}; the "
                        "scale or config.json is of another checkpoint")
    return NAME, scale_name, tile


def check_config(names, config) -> None:
    """config.json must declare quant_method fp8 exactly when the headers show block FP8."""
    method = declared(config).get("quant_method")
    if names and method != "fp8":
        raise UserError(f"config.json declares quant_method {method!r}, but the headers hold {len(names)} block-FP8 "
                        f"tensors, {names[0]} first; restore the original config.json")
    if method == "fp8" and not names:
        raise UserError("config.json declares quant_method 'fp8', but no shard holds an FP8 tensor; shards are missing "
                        "or config.json is of another checkpoint")
