"""What a dialect says of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from stages.checkpoint.header import TensorInfo
    from stages.dialects.reading import Tensors


@dataclass(frozen=True)
class Claim:
    """How one tensor is stored. A weight has a `matrix`; what belongs to a weight names it in `belongs_to`."""

    dialect: str
    scale: str | None = None  # name of the scale tensor
    tile: tuple[int, int] | None = None  # rows and columns under one scale
    matrix: tuple[int, ...] | None = None  # [out, in] or [experts, out, in] of the weight that the tensor stores
    parts: Mapping[str, str] = field(default_factory=dict)  # further tensors of the weight: kind -> name
    belongs_to: str | None = None
    one_scale: bool = False  # a single scale for the whole tensor; of the scale: it is that one
    scales: tuple[tuple[str, int], ...] = ()  # (tensor, its row) for each row of tiles, where they do not just follow each other in `scale`
    transposed: bool = False  # stored as [experts, in, out]; `matrix` and `tile` are those of [experts, out, in] nevertheless

    def companions(self) -> dict[str, str]:
        """All tensors that only this weight needs: kind -> name."""
        return {**({"scale": self.scale} if self.scale else {}), **self.parts}

    def read_from(self) -> set[str]:
        """All tensors that its values depend on, beside its own."""
        return {*self.companions().values(), *(name for name, _ in self.scales)}

    def scale_of(self, row: int) -> tuple[str, int]:
        """(tensor, its row) that holds the scales of a row of tiles."""
        return self.scales[row] if self.scales else (self.scale, row)

    def as_entry(self) -> dict:
        """Its fields as plain data, for JSON."""
        return {"dialect": self.dialect, "scale": self.scale, "tile": list(self.tile) if self.tile else None,
                "matrix": list(self.matrix) if self.matrix else None, "parts": dict(self.parts), "belongs_to": self.belongs_to,
                "one_scale": self.one_scale, "scales": [list(place) for place in self.scales], "transposed": self.transposed}

    def transpose(self) -> Claim:
        """The claim of the same tensor read the other way: of [experts, out, in] from what is stored as [experts, in, out], and back."""
        return replace(self, matrix=(*self.matrix[:-2], *self.matrix[:-3:-1]), tile=self.tile and self.tile[::-1], transposed=not self.transposed)

    @classmethod
    def from_entry(cls, entry: Mapping) -> Claim:
        """The claim that `as_entry` wrote."""
        tuples = {key: tuple(entry[key]) if entry[key] else None for key in ("tile", "matrix")} | {"scales": tuple(map(tuple, entry["scales"]))}
        return cls(**{field.name: entry[field.name] for field in fields(cls)} | tuples)


class Dialect(Protocol):
    """What a module of this package has."""

    NAME: str
    LABEL: str  # for messages
    CAN_STAY: bool  # whether a release can have its weights as they are
    IS_COARSE: bool  # of four bits, whose values MXFP4 rounds a second time
    METHODS: tuple[str, ...] | None  # each `quant_method` of config.json under which its weights occur; None: under any, and without one

    @staticmethod
    def claim(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, str], config: dict) -> Claim | None:
        """How a tensor is stored, if it is a weight of this dialect; its scales follow from the claim.

        tensors: header entries of the whole checkpoint. shard_of: tensor -> shard. UserError for a weight of this dialect that cannot be read.
        """

    @staticmethod
    def rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int,
             buffer: memoryview | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """`stored_rows` (stages/dialects/reading.py) of a claimed weight that is not stored transposed."""
