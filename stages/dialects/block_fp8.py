"""Block FP8: float8_e4m3fn codes and one scale per tile of, mostly, 128x128.

    w[r, c] = float32(weight[r, c]) * float32(scale[r // tile_rows, c // tile_columns])

Despite its name `weight_scale_inv` multiplies. 2D and 3D (experts first) are the same, the last two dimensions count; edges
may be ragged. The tile is what config.json declares (128x128 when it is silent), and the two shapes must agree with it: a
disagreement names both instead of guessing.

    weight + weight_scale_inv  F32, BF16, F16   quant_method fp8
    weight + weight_scale      F32, BF16, F16   compressed-tensors, strategy block; Quark, qscheme per_block
    weight + scale             F8_E8M0          DeepSeek-V4; under the names above F8_E8M0 and, where config.json declares the tile, U8, too

MiMo-V2-Flash was quantized as each of num_key_value_heads GPUs held it, q, k and v merged, and then split apart. Where k's share of a GPU ends
within a tile, v's begins in that tile, whose scale is stored with k:

    rows of a share    k 192, v 128: merged 320 in 3 tiles         scales    k 2 rows, v 1 row; v's first 64 rows have k's second
"""

from __future__ import annotations

import math
import re

from stages.checkpoint.header import FLOATS
from stages.dialects.claim import Claim
from stages.dialects.config import KEY_VALUE_HEADS, block_edges, declared, whole_number
from stages.errors import UserError

NAME = "block_fp8"
LABEL, CAN_STAY, IS_COARSE = "block-FP8 weights", True, False
METHODS = ("fp8", "compressed-tensors", "quark", "modelopt", "modelopt_mixed")
E8M0 = ("U8", "F8_E8M0")  # dtypes of E8M0 scales
SCALE_DTYPES = (*FLOATS, *E8M0)
DEFAULT_TILE, MICROSCALED = (128, 128), (1, 32)
MERGED = "MiMoV2FlashForCausalLM"  # the architecture whose q, k and v were quantized merged


def declared_weights(config: dict) -> list[dict]:
    """The `weights` of each compressed-tensors group."""
    groups = declared(config).get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]


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


def scale_of(name: str) -> list[str]:
    """Names that the scale of FP8 weight `name` may have."""
    return [f"{name}_scale_inv", f"{name}_scale", *([f"{name.removesuffix('weight')}scale"] if name.endswith(".weight") else [])]


def granularity(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> str | None:
    """`channel` where a scale of that shape has one number per output channel (row) of the weight, `tensor` where it has one for the whole weight;
    None where it is neither."""
    if len(shape) < 2:
        return None
    if scale_shape == (*shape[:-1], 1):
        return "channel"
    if len(shape) == 2 and scale_shape in ((), (1,), (1, 1)):
        return "tensor"
    return "channel" if len(shape) == 2 and scale_shape == shape[:1] else None  # Quark's and ModelOpt's


def is_microscaled(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> bool:
    """Whether a scale of that shape has one number per 32 inputs, as MXFP8's."""
    return len(shape) > 1 and scale_shape == (*shape[:-1], -(-shape[-1] // MICROSCALED[1]))


def claim(name, info, tensors, shard_of, config):
    """Claims FP8 weights with tile scales."""
    if info.dtype != "F8_E4M3":
        return None
    found = [candidate for candidate in scale_of(name) if candidate in tensors]
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
        return None  # scales per channel or tensor, or MXFP8
    if scale.dtype == "U8" and (not fits or config_tile in (None, MICROSCALED)):
        return None  # MXFP8; E8M0 of declared tiles otherwise
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has dtype {scale.dtype}, expected one of "
                        f"{', '.join(SCALE_DTYPES)}; this is another dialect than block FP8 and is not read yet")
    if scale.dtype == "F8_E8M0" and is_microscaled(info.shape, scale.shape) and (not fits or declared(config).get("quant_method") not in METHODS):
        return None
    if merged := _merged_tiles(name, tensors, config, tile):
        return Claim(NAME, scale_name, merged[0], info.shape, static_scale(name, tensors), scales=merged[1])
    if not fits:
        kind = granularity(info.shape, scale.shape)
        if kind and (scale_name.endswith("weight_scale") or (kind == "tensor" and config_tile is None)):
            return None  # another group of the same checkpoint, per channel or tensor
        source = "by config.json" if config_tile else "the usual ones, config.json declares none"
        raise UserError(f"{shard_of[scale_name]}: scale {scale_name} has shape {list(scale.shape)}, but tiles of "
                        f"{list(tile)} ({source}) cut {name} of shape {list(info.shape)} into {list(expected)}; the "
                        "scale or config.json is of another checkpoint")
    return Claim(NAME, scale_name, tile, info.shape, static_scale(name, tensors))


def _merged_tiles(name, tensors, config, tile) -> tuple[tuple[int, int], tuple[tuple[str, int], ...]] | None:
    """(tile, (tensor, row) of the scales of each row of tiles) of k or v quantized merged and split within a tile; None for other weights.

    The tile's height is reduced so that no tile has rows of both k and v.
    """
    found = re.fullmatch(r"(.*\.)([kv])_proj\.weight", name)
    if found is None or MERGED not in (config.get("architectures") or []):
        return None
    shares = whole_number(config, *KEY_VALUE_HEADS) or 1
    names = {part: f"{found[1]}{part}_proj.weight" for part in "qkv"}
    scales = {part: f"{weight}_scale_inv" for part, weight in names.items()}
    if not {*names.values(), *scales.values()} <= set(tensors) or any(tensors[weight].shape[0] % shares for weight in names.values()):
        return None
    q, k, v = (tensors[weight].shape[0] // shares for weight in names.values())
    heights = {"k": -(-k // tile[0]), "v": -(-(k + v) // tile[0]) - -(-k // tile[0])}
    columns = -(-tensors[name].shape[1] // tile[1])
    if q % tile[0] or k % tile[0] == 0 or any(tensors[scales[part]].shape != (shares * height, columns) for part, height in heights.items()):
        return None
    height, first, rows = math.gcd(tile[0], k, v), *((0, k) if found[2] == "k" else (k, v))
    places = [(share, row // tile[0]) for share in range(shares) for row in range(first, first + rows, height)]
    return (height, tile[1]), tuple((scales["k"], share * heights["k"] + row) if row < heights["k"] else
                                    (scales["v"], share * heights["v"] + row - heights["k"]) for share, row in places)


def static_scale(name: str, tensors) -> dict[str, str]:
    """The scale of activations that goes along with a weight, as a part of its claim: kind -> name."""
    stem = re.sub(r"(?<=\.)weight(_packed)?$|(?<=_)blocks$", "", name)
    stem = f"{name}_" if stem == name else stem
    return {kind: stem + kind for kind in ("input_scale", "act_scale", "activation_scale") if stem + kind in tensors}


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Codes, and the float scales of their tiles; also for MXFP8 and for scales per channel or tensor."""
    import numpy as np

    from kernels.arrays import e8m0_to_float32, to_float32

    codes = tensors.matrix_array(name, expert, begin, end, buffer)
    if claim.one_scale:
        return codes, np.full((end - begin, 1), to_float32(tensors.array(claim.scale)).item(), np.float32)
    first, last = begin // claim.tile[0], -(-end // claim.tile[0])
    if claim.scales:
        scale = np.concatenate([tensors.matrix_array(part, None, row, row + 1) for part, row in claim.scales[first:last]])
    else:
        scale = tensors.matrix_array(claim.scale, expert, first, last)
    return codes, e8m0_to_float32(scale) if scale.dtype == np.uint8 else to_float32(scale)
