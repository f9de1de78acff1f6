"""How one weight of a release is compared with its source's: a quantized matrix by its SQNR, any other tensor by its bytes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kernels.decibels import decibels
from kernels.difference import difference
from kernels.errors import NonFiniteError
from stages.checkpoint.files import memory
from stages.checkpoint.header import FLOATS
from stages.checkpoint.reader import as_tensor
from stages.checkup.checkpoint import SAMPLED_ROWS, Checkpoint, Pair
from stages.checkup.source import Source
from stages.dialects.reading import decoded_rows, stored_rows
from stages.errors import UserError
from stages.schemes import SCHEMES

ROWS_AT_ONCE = 4 << 20  # weights decoded at once in a comparison
DECODED_DB = 40.0  # of FP8 that was decoded into BF16, which rounds once
LOWEST_SQNR_DB = 15.0  # against a source; round-to-nearest MXFP4 has 18 to 19.1
LOWEST_ROW_DB = 7.0  # of a single row; under no rule has a block less than 7.5: one value of 3 beside 31 of 0.25, which become zeros
TINY = float(np.finfo(np.float32).tiny)  # rows whose weights are smaller become zeros in MXFP4, too


class Match(NamedTuple):
    """A quantized matrix, and the rows of the source's that it should be."""

    label: str  # what faults call it
    pair: Pair
    expert: int | None  # which matrix of the pair
    name: str  # the source's weight
    index: int | None  # which matrix of that
    rows: tuple[int, int, int]  # of that, as in range()


class Buffers(threading.local):
    """Memory of each thread's own for what is read: fresh memory costs more than reading."""

    @cached_property
    def codes(self) -> memoryview:
        """For the release's."""
        return memory(4 * ROWS_AT_ONCE)

    @cached_property
    def source(self) -> memoryview:
        """For the source's."""
        return memory(4 * ROWS_AT_ONCE)


def compare_matrix(checkpoint: Checkpoint, source: Source, buffers: Buffers, match: Match) -> str | None:
    """The fault of one matrix, by its SQNR against rows of the source's: over all of them, over four short runs of rows with
    `quick`."""
    label, stored, name = match.label, match.pair.stored, match.name
    signal, error, worst = 0.0, 0.0, (0.0, 0)  # worst: (error over signal, row)
    try:
        for begin, end in _spans(source, match, checkpoint.quick):
            sums = _sums(checkpoint, source, buffers, match, begin, end)
            signal, error = signal + float(sums[0].sum()), error + float(sums[1].sum())
            apart = sums[1] / np.maximum(sums[0], match.pair.shape[1] * TINY**2)
            worst = max(worst, (float(apart.max()), begin + int(apart.argmax())))
    except NonFiniteError as fault:
        return f"{label}: {fault}"
    if error and source.claims[name].dialect == stored:
        return f"{label}: the source's {name} is {stored} already, but the values are others"
    if decibels(signal, error) < LOWEST_SQNR_DB:
        return (f"{label}: has {decibels(signal, error):.1f} dB SQNR against the source's {name}, less than {LOWEST_SQNR_DB:g}; it is another matrix, or "
                "its exponents are shifted")
    if worst[0] > 10 ** (-LOWEST_ROW_DB / 10):
        return (f"{label}: row {worst[1]} has {10 * math.log10(1 / worst[0]):.1f} dB SQNR against the source's {name}, less than {LOWEST_ROW_DB:g}, which no "
                "rounding makes; it is another row, or was lost")
    return None


def _spans(source: Source, match: Match, quick: bool) -> list[tuple[int, int]]:
    """Spans of rows that are compared at once, aligned to the source's tiles where possible."""
    claim, rows = source.claims[match.name], range(*match.rows)
    step = claim.tile[0] if claim.tile else 1
    if quick:
        starts = sorted({len(rows) * quarter // 4 // step * step for quarter in range(4)})
        return [(begin, min(begin + SAMPLED_ROWS // 4, len(rows))) for begin in starts]
    height = max(step, ROWS_AT_ONCE // (claim.matrix[-1] * rows.step) // step * step)
    return [(begin, min(begin + height, len(rows))) for begin in range(0, len(rows), height)]


def _sums(checkpoint: Checkpoint, source: Source, buffers: Buffers, match: Match, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(signal, error), sums of squares over each of a span of rows; NonFiniteError for NaN or an unusable scale in the release, UserError for one in the
    source."""
    _, pair, expert, name, index, rows = match
    claim, panel = source.claims[name], range(*rows)[begin:end]
    height = claim.tile[0] if claim.tile else 1
    edge = panel[0] // height * height  # of the tile that holds the first row: the second half of a fused matrix may begin within one
    codes = checkpoint.reader(pair.codes).matrix_array(pair.codes, expert, begin, end, buffers.codes)
    scales = checkpoint.reader(pair.scale).matrix_array(pair.scale, expert, begin, end)
    with _blaming(source, name):
        weight, tiles = stored_rows(source.places, name, claim, index, edge, panel[-1] + 1, buffers.source)
        if panel.step > 1 or edge < panel[0]:  # every other row, or the first ones, are another matrix's
            if tiles is not None:
                weight, tiles = decoded_rows(source.places, name, claim, index, edge, panel[-1] + 1).numpy(), None
            weight = np.ascontiguousarray(weight[panel[0] - edge::panel.step])
        sums = difference(weight, tiles, claim.tile, codes, scales, pair.stored)
        if not np.isfinite(sums).all():  # decoding says which number it is
            decoded_rows(source.places, name, claim, index, edge, panel[-1] + 1)
    if not np.isfinite(sums).all():
        SCHEMES[pair.stored].dequantize(as_tensor(codes, pair.info.dtype), as_tensor(scales, checkpoint.tensors[pair.scale].dtype))
    return sums


def compare_bytes(checkpoint: Checkpoint, source: Source, names: tuple[str, str]) -> str | None:
    """The fault of a tensor that should have passed through, of the same dtype and shape."""
    name, origin = names
    pairs = zip(checkpoint.reader(name).chunks(name), source.reader(origin).chunks(origin))
    if all(np.array_equal(np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)) for ours, theirs in pairs):
        return None
    return f"{checkpoint.shard_of[name]}: {name} is not bit-identical to the source's"


def compare_decoded(checkpoint: Checkpoint, source: Source, name: str, origin: str) -> Iterator[str]:
    """A tensor of another dtype or shape than the source's is a fault, unless it is FP8 that whatever made it has decoded."""
    info, found, claim = checkpoint.tensors[name], source.tensors[origin], source.claims[origin]
    line = f"{name}: is {info.dtype} {list(info.shape)}, the source's is {found.dtype} {list(found.shape)}"
    if not claim.scale or claim.matrix != info.shape or len(info.shape) != 2 or info.dtype not in FLOATS:
        yield line
        return
    ours = checkpoint.reader(name).tensor(name).double()
    with _blaming(source, origin):
        theirs = decoded_rows(source.places, origin, claim, None, 0, claim.matrix[0]).double()
    error, signal = (ours - theirs).square().sum().item(), theirs.square().sum().item()
    if decibels(signal, error) < DECODED_DB:
        yield f"{line}, and its values are others than those of the source"
    else:
        checkpoint.notes.append(f"{line}; whatever made it has decoded it, its values are the source's")


@contextmanager
def _blaming(source: Source, name: str) -> Iterator[None]:
    """Turns a NonFiniteError within the block into a UserError: the source is damaged, so that nothing can be said of the release."""
    try:
        yield
    except NonFiniteError as fault:
        raise UserError(f"--source {source.directory}: {name}: {fault}; the source is damaged") from None
