"""Rows of a source weight, whatever its dialect and wherever its tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stages.checkpoint.reader import as_tensor
from stages.dialects import by_name
from stages.dialects.claim import Claim

if TYPE_CHECKING:
    import numpy as np
    import torch

SLAB_WEIGHTS = 128 << 10  # of a tensor that is stored transposed: read at once, and turned while the cache holds them


class Tensors:
    """Stored tensors by name, in whichever shard: `place(name)` gives its ShardReader, or an object with that one's methods `info`, `array` and
    `matrix_array`."""

    def __init__(self, place: Callable[[str], object]):
        self._place = place

    def array(self, name: str) -> np.ndarray:
        """The whole tensor."""
        return self._place(name).array(name)

    def matrix_array(self, name: str, expert: int | None, begin: int, end: int, buffer: memoryview | None = None) -> np.ndarray:
        """Rows begin..end of one matrix, [end - begin, bytes or elements of a row]."""
        return self._place(name).matrix_array(name, expert, begin, end, buffer)

    def tensor(self, name: str) -> torch.Tensor:
        """`array` for torch."""
        return as_tensor(self.array(name), self._place(name).info(name).dtype)

    def matrix_rows(self, name: str, expert: int | None, begin: int, end: int, buffer: memoryview | None = None) -> torch.Tensor:
        """`matrix_array` for torch."""
        return as_tensor(self.matrix_array(name, expert, begin, end, buffer), self._place(name).info(name).dtype)


def stored_rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int,
                buffer: memoryview | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows begin..end, their float32 tile scales or None) of one matrix of a weight, in the form of kernels/arrays.py.

    Float rows are the values themselves. FP8 codes come with the scales of their tiles, so that kernels can decode them as
    they go; `begin` then lies on a tile's edge. With `buffer` the rows may lie in it until it is used again.
    Raises kernels.errors.NonFiniteError, whose index counts from `begin`, for NaN, infinity or an unusable scale.
    """
    read = _transposed_rows if claim.transposed else by_name(claim.dialect).rows
    return read(tensors, name, claim, expert, begin, end, buffer)


def _transposed_rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int,
                     buffer: memoryview | None) -> tuple[np.ndarray, np.ndarray | None]:
    """`stored_rows` of a weight that has them as columns: all of the matrix is read for them, a slab at a time."""
    import numpy as np

    stored = claim.transpose()
    inputs, outputs = stored.matrix[-2:]
    edge = stored.tile[0] if stored.tile else 1
    height = max(edge, SLAB_WEIGHTS // outputs // edge * edge)
    weight, scales = None, []
    for first in range(0, inputs, height):
        slab, scale = by_name(claim.dialect).rows(tensors, name, stored, expert, first, min(first + height, inputs))
        if weight is None:
            size = (end - begin) * inputs * slab.itemsize
            weight = np.ndarray((end - begin, inputs), slab.dtype, buffer if buffer is not None and len(buffer) >= size else None)
        weight[:, first:first + len(slab)] = slab[:, begin:end].T
        if scale is not None:
            scales.append(scale[:, begin // claim.tile[0]:-(-end // claim.tile[0])].T)
    return weight, np.concatenate(scales, axis=1) if scales else None


def as_tensors(weight: np.ndarray, scale: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `stored_rows` gives, for torch."""
    if scale is not None:
        return as_tensor(weight, "F8_E4M3"), as_tensor(scale, "F32")
    return as_tensor(weight, {"uint16": "BF16", "float16": "F16", "float32": "F32"}[weight.dtype.name]), None


def decoded_rows(tensors: Tensors, name: str, claim: Claim, expert: int | None, begin: int, end: int) -> torch.Tensor:
    """Rows begin..end of one matrix of a weight as float32 [end - begin, in], exact."""
    from kernels.fp8 import decode_block_fp8

    stored, scale = as_tensors(*stored_rows(tensors, name, claim, expert, begin, end))
    return stored.float() if scale is None else decode_block_fp8(stored, scale, claim.tile)


def decoded(tensors: Tensors, name: str, claim: Claim) -> torch.Tensor:
    """A whole weight as float32 [out, in] or [experts, out, in], exact."""
    import torch

    if len(claim.matrix) == 2:
        return decoded_rows(tensors, name, claim, None, 0, claim.matrix[0])
    return torch.stack([decoded_rows(tensors, name, claim, expert, 0, claim.matrix[1]) for expert in range(claim.matrix[0])])
