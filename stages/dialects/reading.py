"""Rows of a source weight, whatever its dialect and wherever its tensors lie."""

from __future__ import annotations

from collections.abc import Callable

from stages.dialects import by_name
from stages.dialects.claim import Claim


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
