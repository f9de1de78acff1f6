"""What a dialect says of a tensor, and how rows of a weight are read whatever its dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TILED = ("block_fp8", "mxfp8", "channel_fp8")  # dialects whose codes kernels take as they are, with float tile scales


@dataclass(frozen=True)
class Claim:
    """How one tensor is stored. A weight has a `matrix`; what belongs to a weight names it in `belongs_to`."""

    dialect: str
    scale: str | None = None  # name of the scale tensor
    tile: tuple[int, int] | None = None  # rows and columns under one scale
    matrix: tuple[int, ...] | None = None  # [out, in] or [experts, out, in] of the weight that the tensor stores
    parts: Mapping[str, str] = field(default_factory=dict)  # further tensors of the weight: kind -> name
    belongs_to: str | None = None
    one_scale: bool = False  # a single scale for the whole tensor

    def companions(self) -> dict[str, str]:
        """All tensors that only this weight needs: kind -> name."""
        return {**({"scale": self.scale} if self.scale else {}), **self.parts}

    def as_entry(self) -> dict:
        """Its fields as plain data, for JSON."""
        return {"dialect": self.dialect, "scale": self.scale, "tile": list(self.tile) if self.tile else None,
                "matrix": list(self.matrix) if self.matrix else None, "parts": dict(self.parts), "belongs_to": self.belongs_to,
                "one_scale": self.one_scale}

    @classmethod
    def from_entry(cls, entry: Mapping) -> Claim:
        """The claim that `as_entry` wrote."""
        return cls(entry["dialect"], entry["scale"], tuple(entry["tile"]) if entry["tile"] else None,
                   tuple(entry["matrix"]) if entry["matrix"] else None, entry["parts"], entry["belongs_to"],
                   entry["one_scale"])


class Tensors:
    """Stored tensors by name, wherever each of them lies: `place(name)` gives an object with the methods of ShardReader."""

    def __init__(self, place: Callable[[str], object]):
        self._place = place

    def matrix_rows(self, name: str, expert: int | None, begin: int, end: int, buffer: bytearray | None = None):
        """Rows begin..end of one matrix, [end - begin, bytes or elements of a row]."""
        return self._place(name).matrix_rows(name, expert, begin, end, buffer)

    def tensor(self, name: str):
        """The whole tensor."""
        return self._place(name).tensor(name)


def stored_rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int,
                buffer: bytearray | None = None):
    """(rows begin..end, their float tile scales or None) of one matrix of a weight.

    Float rows are the values themselves. FP8 codes come with the scales of their tiles, so that kernels can decode them as
    they go; `begin` then lies on a tile's edge. With `buffer` the rows may lie in it until it is used again.
    Raises kernels.formats.NonFiniteError, whose index counts from `begin`, for what is no number.
    """
    from stages.dialects import by_name

    return by_name(claim.dialect).rows(tensors, name, claim, expert, begin, end, buffer)


def decoded_rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int):
    """Rows begin..end of one matrix of a weight as float32 [end - begin, in], exact."""
    from kernels.fp8 import decode_block_fp8

    stored, scale = stored_rows(tensors, name, claim, expert, begin, end)
    return stored.float() if scale is None else decode_block_fp8(stored, scale, claim.tile)


def decoded(tensors: Tensors, name: str, claim: Claim):
    """A whole weight as float32 [out, in] or [experts, out, in], exact."""
    import torch

    if len(claim.matrix) == 2:
        return decoded_rows(tensors, name, claim, None, 0, claim.matrix[0])
    return torch.stack([decoded_rows(tensors, name, claim, expert, 0, claim.matrix[1]) for expert in range(claim.matrix[0])])
