"""Whether a release's weights are those of its source: what each was made from, and whether anything was lost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial

from stages.checkup.checkpoint import Checkpoint
from stages.checkup.comparison import Buffers, Match, compare_bytes, compare_decoded, compare_matrix
from stages.checkup.faults import on_all_cores, some
from stages.checkup.source import Source
from stages.schemes.modules import matrices, module_of


def against_source(checkpoint: Checkpoint, source: Source | None) -> Iterator[str]:
    """Quantized matrices are the source's to LOWEST_SQNR_DB, everything else is bit-identical, and nothing is missing."""
    if source is None:
        return
    matches = yield from _matches(checkpoint, source)
    with _one_torch_thread():
        yield from on_all_cores(partial(compare_matrix, checkpoint, source, Buffers()), matches)
    passed = yield from _passed_through(checkpoint, source)
    yield from _lost_matrices(source, matches)
    companions = {name for name, claim in source.claims.items() if claim.belongs_to}
    covered = {match.name for match in matches} | {origin for _, origin in passed}
    yield from some(sorted(set(source.tensors) - covered - companions), "there is nothing of the source's", "it was lost")
    checkpoint.counts["against_source"] = len(matches) + len(passed)


def _matches(checkpoint: Checkpoint, source: Source) -> Generator[str, None, list[Match]]:
    """All quantized matrices that the source has a weight for; faults of those for which it has none, or one of another shape."""
    result = []
    for pair in checkpoint.decodable():
        for expert, label in pair.members():
            prefix, _, projection = pair.module.rpartition(".")
            found = source.origins.get(pair.module) or source.origins.get(f"{prefix}.experts.{expert}.{projection}")
            if found is None:
                yield f"{label}: the source has no weight that becomes it"
                break
            name, matrix = found
            number = matrix.expert if expert is None or matrix.module != pair.module else expert
            shape = source.claims[name].matrix
            has_it = len(shape) == 2 if number is None else len(shape) == 3 and number < shape[0]
            if not has_it or (len(range(*matrix.rows)), shape[-1]) != pair.shape:
                yield f"{label}: decodes to {list(pair.shape)}, the source's {name} has {list(shape)}"
                continue
            result.append(Match(label, pair, expert, name, number, matrix.rows))
    return result


def _passed_through(checkpoint: Checkpoint, source: Source) -> Generator[str, None, list[tuple[str, str]]]:
    """(name, the source's name) of every tensor that is not quantized and that the source has, too; faults where its bytes differ."""
    compared = {pair.module for pair in checkpoint.decodable()}
    result, same = [], []
    for name, info in checkpoint.tensors.items():
        names = [name, f"{name}_inv", re.sub(r"weight_scale$", "scale", name)] if name.endswith("weight_scale") else [name]
        origin = next((candidate for candidate in names if candidate in source.tensors), None)
        if origin is None or module_of(name) in compared:
            continue
        found = source.tensors[origin]
        result.append((name, origin))
        if (found.dtype, found.shape) != (info.dtype, info.shape):
            yield from compare_decoded(checkpoint, source, name, origin)
        elif not checkpoint.quick:
            same.append((name, origin))
    yield from on_all_cores(partial(compare_bytes, checkpoint, source), same)
    return result


def _lost_matrices(source: Source, matches: list[Match]) -> Iterator[str]:
    """Matrices that the release does not have, of source weights of which it has others."""
    converted = defaultdict(set)
    for match in matches:
        converted[match.name].add((match.number, match.rows))
    for name, numbers in converted.items():
        shape = source.claims[name].matrix
        wanted = {(matrix.expert, matrix.rows) for matrix in matrices(name, shape, "per_expert")}
        if len(shape) == 3 and {rows for _, rows in numbers} != {rows for _, rows in wanted}:
            wanted = {(number, (0, shape[1], 1)) for number in range(shape[0])}
        yield from some([f"{name}[{number}]" for number, _ in sorted(wanted - numbers, key=str)], "there is nothing of the source's",
                        "the expert was lost")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Some sources are decoded by torch, which would start a thread per core in each of ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
