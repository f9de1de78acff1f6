"""Whether a release's weights are those of its source: what each was made from, and whether anything was lost."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial

from stages.checkpoint.files import sha256_file
from stages.checkup.checkpoint import Checkpoint
from stages.checkup.comparison import Buffers, Match, compare_bytes, compare_decoded, compare_matrix
from stages.checkup.faults import on_all_cores, some
from stages.checkup.source import Source
from stages.dialects.cache_scales import is_unread, name_in_release
from stages.planning.outputs import release_config
from stages.schemes import draft_scales, kept
from stages.schemes.modules import matrices, module_of

OF_ITS_WRITER = ("transformers_version", "_name_or_path", "use_cache")  # keys of config.json that say nothing of a model
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt")  # say which token an id is
RENAMED = {"torch_dtype": "dtype"}  # by transformers 5


def compare(checkpoint: Checkpoint, source: Source | None) -> Iterator[str]:
    """Quantized matrices are the source's to LOWEST_SQNR_DB, everything else is bit-identical, nothing is missing, and nothing came in."""
    if source is None:
        return
    matches = yield from _matches(checkpoint, source)
    with _one_torch_thread():
        yield from on_all_cores(partial(compare_matrix, checkpoint, source, Buffers()), matches)
    passed = yield from _passed_through(checkpoint, source)
    yield from _lost_matrices(source, matches)
    companions = {name for name, claim in source.claims.items() if claim.belongs_to or is_unread(name, source.tensors[name].shape)}
    covered = {match.name for match in matches} | {origin for _, origin in passed}
    yield from some(sorted(set(source.tensors) - covered - companions), "there is nothing of the source's", "it was lost")
    known = {name for name, _ in passed} | {name for pair in checkpoint.decodable() for name in (pair.codes, pair.scale)}
    added = [name for name in checkpoint.tensors if name not in known and module_of(name) not in source.origins and not _is_inert(checkpoint, name)]
    yield from some(sorted(added), "the source has no", "an engine takes it for the model's")
    yield from _config(checkpoint, source)
    _compare_tokenizers(checkpoint, source)
    checkpoint.counts["against_source"] = len(matches) + len(passed)


def _compare_tokenizers(checkpoint: Checkpoint, source: Source) -> None:
    """Notes of files of the tokenizer that are not the source's; a tool that writes them anew may have changed no token."""
    for name in TOKENIZER:
        ours, theirs = checkpoint.directory / name, source.directory / name
        if theirs.is_file() and not ours.is_file():
            checkpoint.notes.append(f"{name}: the source has it, the release has not")
        elif theirs.is_file() and sha256_file(ours) != sha256_file(theirs):
            checkpoint.notes.append(f"{name}: has other bytes than the source's; see that ids mean the same tokens")


def _is_inert(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is one of those that `release.draft_scales` adds, with the value that changes nothing."""
    if not draft_scales.NAME.fullmatch(name) or checkpoint.tensors[name].dtype != "F32":
        return False
    return checkpoint.reader(name).tensor(name).tolist() == [draft_scales.VALUES[name.rpartition(".")[2]]]


def _config(checkpoint: Checkpoint, source: Source) -> Iterator[str]:
    """config.json says what the source's says, but for quantization_config.

    A note of what only one of them says: whatever made the release may have written defaults out, left them out, or moved a key, as
    transformers 5 moves rope_theta into rope_parameters. Where a key has come in, the source's of the same name elsewhere must have its value.
    """
    ours, theirs = (dict(_values(release_config(config, {}))) for config in (checkpoint.config, source.config))
    for key, value in sorted(ours.items()):
        others = [key] if key in theirs else [other for other in theirs if _name_of(other) == _name_of(key)]
        if others and not any(value == theirs[other] or json.dumps(value) == json.dumps(theirs[other]) for other in others):  # NaN equals as text
            yield f"config.json: {key} is {str(value)[:60]}, the source's {others[0]} is {str(theirs[others[0]])[:60]}"
    only_ours, only_theirs = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    for keys, what in ((only_ours, "says what the source's does not"), (only_theirs, "does not say what the source's does")):
        if keys:
            checkpoint.notes.append(f"config.json: {what}: {', '.join(sorted(keys))[:200]}")


def _values(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in a config that a model can depend on; null is as good as nothing."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        elif value is not None and key not in OF_ITS_WRITER:
            yield prefix + RENAMED.get(key, key), value


def _name_of(key: str) -> tuple[str, str]:
    """(text_config, vision_config ... or nothing, last name) of a dotted key."""
    part = key.partition(".")[0]
    return part if part.endswith("_config") else "", key.rpartition(".")[2]


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
            index = matrix.index if expert is None or matrix.module != pair.module else expert
            shape = source.claims[name].matrix
            has_it = len(shape) == 2 if index is None else len(shape) == 3 and index < shape[0]
            if not has_it or (len(range(*matrix.rows)), shape[-1]) != pair.shape:
                yield f"{label}: decodes to {list(pair.shape)}, the source's {name} has {list(shape)}"
                continue
            result.append(Match(label, pair, expert, name, index, matrix.rows))
    return result


def _passed_through(checkpoint: Checkpoint, source: Source) -> Generator[str, None, list[tuple[str, str]]]:
    """(name, the source's name) of every tensor that is not quantized and that the source has, too; faults where its bytes differ."""
    compared = {pair.module for pair in checkpoint.decodable()}
    result, same = [], []
    renamed = {written: name for name in source.tensors if (written := name_in_release(name)) != name}
    for name, info in checkpoint.tensors.items():
        names = [name, f"{name}_inv", re.sub(r"weight_scale$", "scale", name)] if name.endswith("weight_scale") else [name, renamed.get(name)]
        origin = next((candidate for candidate in names if candidate in source.tensors), None)
        if origin is None or module_of(name) in compared:
            continue
        found, claim = source.tensors[origin], source.claims[origin]
        result.append((name, origin))
        written = kept.as_written(found.dtype, found.shape, claim.one_scale) if claim.belongs_to else (found.dtype, found.shape)
        if written != (info.dtype, info.shape):
            yield from compare_decoded(checkpoint, source, name, origin)
        elif not checkpoint.quick:
            same.append((name, origin))
    yield from on_all_cores(partial(compare_bytes, checkpoint, source), same)
    return result


def _lost_matrices(source: Source, matches: list[Match]) -> Iterator[str]:
    """Matrices that the release does not have, of source weights of which it has others."""
    converted = defaultdict(set)
    for match in matches:
        converted[match.name].add((match.index, match.rows))
    for name, found in converted.items():
        shape = source.claims[name].matrix
        wanted = {(matrix.index, matrix.rows) for matrix in matrices(name, shape, "per_expert")}
        if len(shape) == 3 and {rows for _, rows in found} != {rows for _, rows in wanted}:
            wanted = {(index, (0, shape[1], 1)) for index in range(shape[0])}
        yield from some([f"{name}[{index}]" for index, _ in sorted(wanted - found, key=str)], "there is nothing of the source's",
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
