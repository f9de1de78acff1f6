"""Whether the numbers are such as weights have, each matrix by itself and beside its siblings."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from kernels.errors import NonFiniteError
from stages.checkpoint.header import FLOATS
from stages.checkpoint.reader import as_array, as_tensor
from stages.checkup.checkpoint import SAMPLED_ROWS, Checkpoint, Pair
from stages.checkup.source import Source
from stages.conversion.numbers import USUAL_SIZES
from stages.schemes import SCHEMES
from stages.schemes.modules import EXPERT

if TYPE_CHECKING:
    import torch

UNUSED_BLOCKS = 0.02  # share of blocks whose largest code may be lower; 0 under the rules, some for clipped weights
APART = 0.75  # |log2| of a matrix's root mean square over its siblings' median, from which it is called apart ...
SPREADS = 8  # ... and a fault where it is so many times the median distance of its siblings, too


def numbers(checkpoint: Checkpoint, source: Source | None) -> Iterator[str]:
    """Scales are numbers, blocks use their range, no matrix stands apart from its siblings."""
    import torch

    sizes: dict[str, dict[str, float]] = defaultdict(dict)  # siblings -> matrix -> root mean square
    seen: dict[tuple[str, bytes], str] = {}  # siblings and their bytes -> the first matrix that had them
    same: list[str] = []
    for pair in checkpoint.decodable():
        siblings = EXPERT.sub(r"\g<layer>.experts.*.\g<projection>", pair.module) if len(pair.info.shape) == 2 else pair.module
        for expert, label in pair.members():
            sample = _sample(checkpoint, pair, expert)
            if sample is None:
                yield f"{checkpoint.shard_of[pair.scale]}: {label}: a block scale is 255, which means NaN"
                continue
            codes, scales = sample
            raw = codes.view(torch.uint8)
            digest = hashlib.sha256(raw.numpy().tobytes() + scales.numpy().tobytes()).digest()
            if source is None and bool(raw.any()) and seen.setdefault((siblings, digest), label) != label:
                yield f"{label}: holds the bytes of {seen[siblings, digest]}; one expert was written twice"
            low, (_, high) = _unused(raw, pair.stored), SCHEMES[pair.stored].HIGH_CODE
            if low > UNUSED_BLOCKS:
                yield (f"{checkpoint.shard_of[pair.codes]}: {label}: {100 * low:.1f} % of its blocks have no value of {high} or above; "
                       "exponents are too high, or the bytes are of another format")
            size = yield from _size(checkpoint, pair, label, codes, scales, compared=source is not None)
            if size is not None:
                same += [label] if scales.numel() >= 64 and bool((scales == scales.flatten()[0]).all()) and size else []
                sizes[siblings][label] = size
    if same:
        checkpoint.notes.append(f"{same[0]}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: all blocks looked at have the same scale, "
                                "which weights hardly ever come to; compare with --source")
    yield from _fp8_numbers(checkpoint)
    yield from _plain_numbers(checkpoint, compared=source is not None)
    if source is None:  # a source knows better
        yield from _sizes_apart(checkpoint, sizes)
    checkpoint.counts["numbers"] = sum(map(len, sizes.values()))


def _sample(checkpoint: Checkpoint, pair: Pair, expert: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(codes, scales) of SAMPLED_ROWS rows: a run at the start and one at the end of the matrix, or, where these are zeros (weights are
    padded so), the first that are not; None where any of its scales is NaN."""
    import torch

    rows = pair.info.shape[-2]
    exponents = checkpoint.reader(pair.scale).matrix_rows(pair.scale, expert, 0, rows)
    if bool((exponents == 255).any()):
        return None
    half = min(rows, SAMPLED_ROWS // 2)
    spans = [(begin, end) for begin, end in ((0, half), (max(half, rows - half), rows)) if end > begin]
    reader = checkpoint.reader(pair.codes)
    codes = torch.cat([reader.matrix_rows(pair.codes, expert, begin, end) for begin, end in spans])
    if not bool(_magnitudes(codes, pair.stored).any()):
        every = reader.matrix_rows(pair.codes, expert, 0, rows)
        found = _magnitudes(every, pair.stored).any(-1).nonzero().flatten()[:SAMPLED_ROWS]
        if len(found):
            return every.view(torch.uint8)[found].view(every.dtype), exponents[found]
    return codes, torch.cat([exponents[begin:end] for begin, end in spans])


def _magnitudes(codes: torch.Tensor, stored: str) -> torch.Tensor:
    """Bytes of codes without their signs: zero where all values are."""
    import torch

    return codes.view(torch.uint8) & (0x7F if stored == "mxfp8" else 0x77)


def _unused(codes: torch.Tensor, stored: str) -> float:
    """Share of the blocks with any value that hold nothing of HIGH_CODE or above; codes uint8 [rows, bytes]."""
    import torch

    values = codes & 0x7F if stored == "mxfp8" else torch.stack((codes & 7, (codes >> 4) & 7), -1).flatten(-2)
    largest = values.unflatten(-1, (-1, SCHEMES[stored].BLOCK)).amax(-1)
    used = largest[largest > 0]
    return float((used < SCHEMES[stored].HIGH_CODE[0]).double().mean()) if used.numel() else 0.0


def _size(checkpoint: Checkpoint, pair: Pair, label: str, codes: torch.Tensor, scales: torch.Tensor,
          compared: bool) -> Generator[str, None, float | None]:
    """The root mean square of what a sample decodes to; None, and a fault, where no network has such weights."""
    try:
        weight = SCHEMES[pair.stored].dequantize(codes, scales).double()
    except NonFiniteError as error:
        yield f"{checkpoint.shard_of[pair.codes]}: {label}: {error}"
        return None
    size = weight.square().mean().sqrt().item()
    if not math.isfinite(size):
        yield f"{label}: decodes to infinite weights; its block scales are out of range"
    elif not size and not compared:
        yield f"{label}: decodes to nothing but zeros; if the source's does, too, compare with --source"
    elif size and not USUAL_SIZES[0] < size < USUAL_SIZES[1]:
        yield f"{label}: decodes to weights of {size:.1e} (root mean square), which no network has; its block scales are wrong"
    else:
        return size
    return None


def _sizes_apart(checkpoint: Checkpoint, sizes: dict[str, dict[str, float]]) -> Iterator[str]:
    """Matrices whose size stands apart from that of their siblings; a note where theirs differ much, too."""
    for members in sizes.values():
        middle = statistics.median(members.values())
        if len(members) < 3 or not middle:
            continue
        octaves = {label: math.log2(size / middle) if size else -math.inf for label, size in members.items()}
        spread = statistics.median(map(abs, octaves.values()))
        for label, apart in octaves.items():
            if abs(apart) <= APART:
                continue
            line = (f"{label}: its weights are {2.0**apart:.2f} times as large as its siblings', half of which lie within "
                    f"{100 * (2.0**spread - 1):.0f} %; exponents may be shifted, compare with --source")
            if abs(apart) > SPREADS * spread:
                yield line
            else:
                checkpoint.notes.append(line)


def _fp8_numbers(checkpoint: Checkpoint) -> Iterator[str]:
    """FP8 under float scales: scales that are no positive numbers, codes that mean NaN."""
    import torch

    for stored, _, name, scale in checkpoint.modules.values():
        if not stored.startswith("fp8 "):
            continue
        values = checkpoint.reader(scale).tensor(scale).float()
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            yield f"{checkpoint.shard_of[scale]}: {scale} holds a scale that is NaN, infinite, zero or negative"
        for chunk in () if checkpoint.quick else checkpoint.reader(name).chunks(name):
            if bool(((torch.frombuffer(chunk, dtype=torch.uint8) & 0x7F) == 0x7F).any()):
                yield f"{checkpoint.shard_of[name]}: {name} holds a code that means NaN"
                break


def _plain_numbers(checkpoint: Checkpoint, compared: bool) -> Iterator[str]:
    """Unquantized weights that hold NaN or infinity, and matrices of nothing but zeros (a norm may be) where no source is compared with."""
    import torch

    for name, info in checkpoint.tensors.items():
        if checkpoint.quick or info.dtype not in FLOATS or not name.endswith("weight"):
            continue
        largest = torch.zeros(())
        for chunk in checkpoint.reader(name).chunks(name):
            values = as_tensor(as_array(chunk, info.dtype, (-1,)), info.dtype)
            largest = torch.maximum(largest, values.abs().max().float())  # NaN stays
        if not bool(torch.isfinite(largest)):
            yield f"{checkpoint.shard_of[name]}: {name} holds NaN or infinity"
        elif len(info.shape) > 1 and math.prod(info.shape) and not bool(largest) and not compared:
            yield f"{checkpoint.shard_of[name]}: {name} holds nothing but zeros; if the source's does, too, compare with --source"
