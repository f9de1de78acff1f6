"""Block FP8: float8_e4m3fn codes and one scale per tile of, mostly, 128x128.

    w[r, c] = float32(weight[r, c]) * float32(scale[r // tile_rows, c // tile_columns])

Despite its name `weight_scale_inv` multiplies. 2D and 3D (experts first) are the same, the last two dimensions count; edges
may be ragged. The tile is what config.json declares (128x128 when it is silent), and the two shapes must agree with it: a
disagreement names both instead of guessing.

    weight + weight_scale_inv  F32, BF16, F16   quant_method fp8
    weight + weight_scale      F32, BF16, F16   compressed-tensors, strategy block; Quark, qscheme per_block
    weight + scale             F8_E8M0          DeepSeek-V4; under the names above F8_E8M0 and, where config.json declares the tile, U8, too
"""

from __future__ import annotations

from stages.checkpoint.header import FLOATS
from stages.dialects import fp8
from stages.dialects.claim import Claim
from stages.dialects.config import block_edges, declared, declared_weights
from stages.dialects.merged_qkv import merged_tiles
from stages.errors import UserError

NAME = "block_fp8"
LABEL, CAN_STAY, IS_COARSE = "block-FP8 weights", True, False
METHODS = ("fp8", "compressed-tensors", "quark", "modelopt", "modelopt_mixed")
SCALE_DTYPES = (*FLOATS, *fp8.E8M0)
DEFAULT_TILE = (128, 128)


def declared_tile(config: dict) -> tuple[int, int] | None:
    """Rows and columns of a tile by config.json, None where it declares none."""
    blocks = [declared(config).get("weight_block_size"), *(weights.get("block_structure") for weights in declared_weights(config))]
    found = block_edges(next((block for block in blocks if block), None) or _tile_of_quark(declared(config)))
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(edge) is int and edge > 0 for edge in found):
        raise UserError(f"config.json: the block size is {found!r}, expected two whole numbers above 0; restore the original config.json")
    return tuple(found)


def _tile_of_quark(section: dict) -> object:
    """The block size that Quark's settings for all layers or for some declare, None where they declare none; UserError where they declare several."""
    settings = [section.get("global_quant_config"), *(part.values() if isinstance(part := section.get("layer_quant_config"), dict) else ())]
    weights = [entry.get("weight") for entry in settings if isinstance(entry, dict)]
    blocks = [weight.get("block_size") for weight in weights if isinstance(weight, dict) and weight.get("qscheme") == "per_block"]
    if any(block != blocks[0] for block in blocks):
        raise UserError(f"config.json: quantization_config has blocks of several sizes, {', '.join(map(str, blocks))[:80]}, which is not read; get the "
                        "checkpoint in BF16 or with blocks of one size")
    return blocks[0] if blocks else None


def claim(name, info, tensors, shard_of, config):
    """Claims FP8 weights with tile scales."""
    if info.dtype != "F8_E4M3":
        return None
    found = [candidate for candidate in fp8.scale_of(name) if candidate in tensors]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{shard_of[name]}: {name} has two scales, {' and '.join(found)}; remove the one that is not its own")
    scale_name = found[0]
    scale, config_tile = tensors[scale_name], declared_tile(config)
    tile = config_tile or DEFAULT_TILE
    expected = (*info.shape[:-2], *(-(-size // edge) for size, edge in zip(info.shape[-2:], tile)))
    fits = len(info.shape) > 1 and scale.shape == expected
    if scale_name.endswith("weight_scale") and config_tile is None:
        return None  # channel_fp8 or mxfp8: weight_scale is theirs, too, and nothing declares a tile
    if scale.dtype == "U8" and (not fits or config_tile in (None, fp8.MICROSCALED)):
        return None  # mxfp8; with a tile that config.json declares and the shape confirms, U8 is E8M0 of that tile
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has dtype {scale.dtype}, expected one of "
                        f"{', '.join(SCALE_DTYPES)}; this is another dialect than block FP8 and is not read yet")
    if scale.dtype == "F8_E8M0" and fp8.is_microscaled(info.shape, scale.shape) and (not fits or declared(config).get("quant_method") not in METHODS):
        return None  # mxfp8
    if merged := merged_tiles(name, tensors, config, tile):
        return Claim(NAME, scale_name, merged[0], info.shape, fp8.static_scale(name, tensors), scales=merged[1])
    if not fits:
        kind = fp8.granularity(info.shape, scale.shape)
        if kind and (scale_name.endswith("weight_scale") or (kind == "tensor" and config_tile is None)):
            return None  # channel_fp8: another group of the same checkpoint
        source = "by config.json" if config_tile else "the usual ones, config.json declares none"
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has shape {list(scale.shape)}, but tiles of "
                        f"{list(tile)} ({source}) cut {name} of shape {list(info.shape)} into {list(expected)}; the "
                        "scale or config.json is of another checkpoint")
    return Claim(NAME, scale_name, tile, info.shape, fp8.static_scale(name, tensors))


rows = fp8.rows
