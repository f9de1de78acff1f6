"""Block FP8: float8_e4m3fn codes and one scale per tile of, mostly, 128x128.

    w[r, c] = float32(weight[r, c]) * float32(scale[r // tile_rows, c // tile_columns])

Despite its name `weight_scale_inv` multiplies. 2D and 3D (experts first) are the same, the last two dimensions count; edges
may be ragged. The tile is what config.json declares (128x128 when it is silent), and the two shapes must agree with it: a
disagreement names both instead of guessing.

    weight + weight_scale_inv  F32, BF16, F16   quant_method fp8
    weight + weight_scale      F32, BF16, F16   compressed-tensors, strategy block
    weight + scale             F8_E8M0          DeepSeek-V4
"""

from __future__ import annotations

from stages.checkpoint.header import FLOATS
from stages.dialects.claim import Claim
from stages.dialects.config import declared
from stages.errors import UserError

NAME = "block_fp8"
METHODS = ("fp8", "compressed-tensors")
SCALE_DTYPES = (*FLOATS, "F8_E8M0")
DEFAULT_TILE = (128, 128)


def declared_weights(config: dict) -> list[dict]:
    """The `weights` of each compressed-tensors group."""
    groups = declared(config).get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]


def declared_tile(config: dict) -> tuple[int, int] | None:
    """Rows and columns of a tile by config.json, None where it declares none."""
    blocks = [declared(config).get("weight_block_size"), *(weights.get("block_structure") for weights in declared_weights(config))]
    found = next((block for block in blocks if block), None)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(edge) is int and edge > 0 for edge in found):
        raise UserError(f"config.json: the block size is {found!r}, expected two whole numbers above 0; restore the original config.json")
    return tuple(found)


def scale_of(name: str) -> list[str]:
    """Names that the scale of FP8 weight `name` may have."""
    return [f"{name}_scale_inv", f"{name}_scale", *([f"{name.removesuffix('weight')}scale"] if name.endswith(".weight") else [])]


def claim(name, info, tensors, where, config):
    """Claims FP8 weights with tile scales."""
    if info.dtype != "F8_E4M3":
        return None
    found = [candidate for candidate in scale_of(name) if candidate in tensors]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{where[name]}: {name} has two scales, {' and '.join(found)}; remove the one that is not its own")
    scale_name = found[0]
    scale, tile = tensors[scale_name], declared_tile(config)
    if scale.dtype == "U8" or (scale_name.endswith("weight_scale") and tile is None):
        return None  # MXFP8, or scales per channel or tensor
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{where[scale_name]}: scale {scale_name} has dtype {scale.dtype}, expected one of "
                        f"{', '.join(SCALE_DTYPES)}; this is another dialect than block FP8 and is not read yet")
    said, tile = "by config.json" if tile else "the usual ones, config.json declares none", tile or DEFAULT_TILE
    expected = (*info.shape[:-2], *(-(-size // edge) for size, edge in zip(info.shape[-2:], tile)))
    if len(info.shape) < 2 or scale.shape != expected:
        if scale_name.endswith("weight_scale") and (scale.shape == (*info.shape[:-1], 1) or scale.shape in ((), (1,), (1, 1))):
            return None  # another group of the same checkpoint, per channel or tensor
        raise UserError(f"{where[scale_name]}: scale {scale_name} has shape {list(scale.shape)}, but tiles of "
                        f"{list(tile)} ({said}) cut {name} of shape {list(info.shape)} into {list(expected)}; the "
                        "scale or config.json is of another checkpoint")
    return Claim(NAME, scale_name, tile, info.shape, static_scale(name, tensors))


def static_scale(name: str, tensors) -> dict[str, str]:
    """The scale of activations that goes along with a weight, as a part of its claim."""
    activations = f"{name.removesuffix('weight')}input_scale"
    return {"input_scale": activations} if name.endswith(".weight") and activations in tensors else {}


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Codes, and the float scales of their tiles; also for MXFP8 and for scales per channel or tensor."""
    import numpy as np

    from kernels.arrays import e8m0_to_float32, to_float32

    codes = tensors.matrix_array(name, expert, begin, end, buffer)
    if claim.one_scale:
        return codes, np.full((end - begin, 1), to_float32(tensors.array(claim.scale)).item(), np.float32)
    scale = tensors.matrix_array(claim.scale, expert, begin // claim.tile[0], -(-end // claim.tile[0]))
    return codes, e8m0_to_float32(scale) if scale.dtype == np.uint8 else to_float32(scale)
