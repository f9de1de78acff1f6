"""k and v of MiMo-V2-Flash, whose block FP8 has tiles that belong to both.

The model was quantized as each of num_key_value_heads GPUs held it, q, k and v merged, and then split apart. Where k's share of a GPU ends
within a tile, v's begins in that tile, whose scale is stored with k:

    rows of a share    k 192, v 128: merged 320 in 3 tiles         scales    k 2 rows, v 1 row; v's first 64 rows have k's second
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from stages.checkpoint.header import TensorInfo
from stages.dialects.config import KEY_VALUE_HEADS, whole_number

ARCHITECTURE = "MiMoV2FlashForCausalLM"

Place = tuple[str, int]  # scale tensor, its row


def merged_tiles(name: str, tensors: Mapping[str, TensorInfo], config: dict, tile: tuple[int, int]) -> tuple[tuple[int, int], tuple[Place, ...]] | None:
    """(tile, place of the scales of each row of tiles) of k or v quantized merged and split within a tile; None for other weights.

    The tile's height is reduced so that no tile has rows of both k and v.
    """
    found = re.fullmatch(r"(.*\.)([kv])_proj\.weight", name)
    if found is None or ARCHITECTURE not in (config.get("architectures") or []):
        return None
    shares = whole_number(config, *KEY_VALUE_HEADS) or 1
    names = {part: f"{found[1]}{part}_proj.weight" for part in "qkv"}
    scales = {part: f"{weight}_scale_inv" for part, weight in names.items()}
    if not {*names.values(), *scales.values()} <= set(tensors) or any(tensors[weight].shape[0] % shares for weight in names.values()):
        return None
    q, k, v = (tensors[weight].shape[0] // shares for weight in names.values())  # rows of a share
    heights = {"k": -(-k // tile[0]), "v": -(-(k + v) // tile[0]) - -(-k // tile[0])}  # rows of its scales
    columns = -(-tensors[name].shape[1] // tile[1])
    if q % tile[0] or k % tile[0] == 0 or any(tensors[scales[part]].shape != (shares * height, columns) for part, height in heights.items()):
        return None

    def place(share: int, row: int) -> Place:
        """Where the scales of a row of tiles of a merged share lie."""
        part, before = ("k", 0) if row < heights["k"] else ("v", heights["k"])
        return scales[part], share * heights[part] + row - before

    height = math.gcd(tile[0], k, v)
    begin, end = (0, k) if found[2] == "k" else (k, k + v)  # of this weight's rows in a merged share
    return (height, tile[1]), tuple(place(share, row // tile[0]) for share in range(shares) for row in range(begin, end, height))
