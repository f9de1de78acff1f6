"""How sources store weights: one file per dialect, one table that recognizes them, one table of tensor roles.

A dialect is recognized from the headers of all shards, tensor by tensor, and cross-checked with config.json; the first
row that claims a tensor wins. Adding a dialect is adding a file and a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.checkpoint.header import TensorInfo
from stages.dialects import block_fp8, channel_fp8, mxfp8, plain
from stages.errors import UserError


@dataclass(frozen=True)
class Claim:
    """How one weight is stored: by which dialect, with which scale tensor, under which tile."""

    dialect: str
    scale: str | None = None
    tile: tuple[int, int] | None = None


DIALECTS = (block_fp8, mxfp8, channel_fp8, plain)  # more specific first


def tile_scales(scale, shape: tuple[int, ...], tile: tuple[int, int]):
    """A stored scale tensor as the float tile scales of an FP8 weight (or some of its rows) of `shape`.

    E8M0 bytes become their powers of two, a single scale for the whole tensor is repeated for each row: kernels know float tiles
    only.
    Raises kernels.formats.NonFiniteError for E8M0 byte 255.
    """
    import torch

    from kernels.formats import e8m0_to_float

    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = e8m0_to_float(scale)
    if tile[0] == 1 and scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape[-2], 1).contiguous()
    return scale


def recognize(tensors: Mapping[str, TensorInfo], where: Mapping[str, str], config: dict) -> dict[str, Claim]:
    """Name -> Claim for every tensor of the checkpoint. `where` gives the shard of each tensor, for messages.

    Raises UserError for a tensor that no dialect understands, for a lone scale, and when config.json and the headers
    disagree (a lost `quantization_config` has made tools drop scales with only a warning).
    """
    claims: dict[str, Claim] = {}
    for name, info in tensors.items():
        for dialect in DIALECTS:
            claimed = dialect.claim(name, info, tensors, where, config)
            if claimed is not None:
                claims[name] = Claim(*claimed)
                break
        else:
            raise UserError(f"{where[name]}: tensor {name} has dtype {info.dtype} and shape {list(info.shape)}, which no "
                            f"dialect here reads ({', '.join(d.NAME for d in DIALECTS)}); it would be converted wrongly")
    for dialect in DIALECTS:
        dialect.check_config([name for name, claim in claims.items() if claim.dialect == dialect.NAME], config)
    return claims
