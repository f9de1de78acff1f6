"""Whether the tensors hang together: in their shards, in the index, and as weights and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator

from stages.checkpoint.files import read_json
from stages.checkpoint.header import FLOATS, INDEX, TensorInfo
from stages.checkup.checkpoint import Checkpoint, Module, scale_shape
from stages.checkup.faults import some
from stages.checkup.json_checks import json_object
from stages.errors import UserError
from stages.schemes import SCHEMES


def containers(checkpoint: Checkpoint) -> Iterator[str]:
    """Every shard's header is sound, and no tensor is in two. Opens the shards, which all other checks need."""
    for path in sorted(checkpoint.directory.glob("*.safetensors")):
        if not path.is_file():
            yield f"{path.name}: is no regular file, or a link to nothing"
            continue
        try:
            twice = checkpoint.open_shard(path)
        except (UserError, OSError) as error:
            yield str(error)
            continue
        yield from (f"{name}: is in {other} and in {path.name}; an engine takes either" for name, other in twice)
    if not checkpoint.readers:
        yield f"{checkpoint.directory}: holds no *.safetensors file that can be read"
    checkpoint.counts["containers"] = len(checkpoint.readers)


def index(checkpoint: Checkpoint) -> Iterator[str]:
    """The index names every tensor in its shard, and the true number of bytes."""
    path, tensors, shard_of = checkpoint.directory / INDEX, checkpoint.tensors, checkpoint.shard_of
    if not path.exists():
        if len(checkpoint.readers) > 1:
            yield f"{INDEX}: is missing, though there are {len(checkpoint.readers)} shards"
        return
    table = read_json(path)
    listed = json_object(table.get("weight_map") or {}, f"{INDEX}: weight_map")
    yield from some(sorted(set(tensors) - set(listed)), f"{INDEX}: does not list", "engines that go by the index miss them")
    yield from some(sorted(set(listed) - set(tensors)), f"{INDEX}: lists", "no shard holds them")
    yield from some([f"{name} ({listed[name]}, is in {shard_of[name]})" for name in sorted(set(listed) & set(tensors))
                     if listed[name] != shard_of[name]], f"{INDEX}: names the wrong shard for", "loading fails")
    total = sum(info.nbytes for info in tensors.values())
    claimed = json_object(table.get("metadata") or {}, f"{INDEX}: metadata").get("total_size")
    if claimed != total:
        yield f"{INDEX}: total_size is {claimed!r}, the tensors have {total} bytes"
    checkpoint.counts["index"] = len(listed)


def pairs(checkpoint: Checkpoint) -> Iterator[str]:
    """Packed weights and scales come in pairs whose dtypes and shapes fit."""
    claimed = set()
    for module, parts in checkpoint.modules.items():
        if parts.stored == "plain":
            yield from _unscaled(module, parts.info)
        else:
            claimed.add(parts.scale)
            yield from _scaled(checkpoint, module, parts)
    alone = [name for name in checkpoint.tensors if re.search(r"weight_(scale|scale_inv|packed|global_scale|zero_point)$", name)
             and name not in claimed and not name.endswith("weight_packed")]
    yield from some(alone, "no weight belongs to", "an engine drops them silently")
    yield from some(_odd_names(checkpoint.tensors, alone), "no engine asks for names like", "a wrong suffix is dropped silently")
    checkpoint.counts["pairs"] = len(claimed)


def _unscaled(module: str, info: TensorInfo) -> Iterator[str]:
    """What is wrong with a weight that has no scale."""
    if info.dtype.startswith("F8"):
        yield f"{module}: its weight is {info.dtype}, but has no weight_scale; its values are lost"
    elif info.dtype not in FLOATS:
        yield f"{module}: its weight is {info.dtype}, but has no scale; an engine takes the numbers as they are"


def _scaled(checkpoint: Checkpoint, module: str, parts: Module) -> Iterator[str]:
    """What is wrong with a quantized weight and its scale."""
    (stored, info, name, scale), shard_of = parts, checkpoint.shard_of
    if info.dtype != (SCHEMES[stored].CODES_DTYPE if stored in SCHEMES else "F8_E4M3"):
        yield f"{shard_of[name]}: {name} is {info.dtype}; only MXFP4 (U8) and MXFP8 are verified here"
        return
    if len(info.shape) not in (2, 3) or not math.prod(info.shape):
        yield f"{shard_of[name]}: {name} has shape {list(info.shape)}, which is no matrix"
        return
    if scale not in checkpoint.tensors:
        yield f"{shard_of[name]}: {name} has no {scale}; an engine leaves the scale uninitialized"
        return
    found = checkpoint.tensors[scale]
    if stored.startswith("fp8"):
        if stored == "fp8":
            yield (f"{shard_of[scale]}: {scale} is {found.dtype} {list(found.shape)}, which is no scale "
                   f"per tensor, per channel or per 128x128 of {name} {list(info.shape)}")
        return
    expected = scale_shape(info, stored)
    if (found.dtype, found.shape) != ("U8", expected):
        yield (f"{shard_of[scale]}: {scale} is {found.dtype} {list(found.shape)}, expected U8 "
               f"{list(expected)} for {name} {list(info.shape)}")
    if stored == "mxfp4" and f"{module}.weight" in checkpoint.tensors:
        yield f"{module}: is there as weight_packed and as weight; an engine takes one and drops the other"


def _odd_names(names: Collection[str], alone: list[str]) -> list[str]:
    """Names that no engine asks for: of paths, with numbers that begin with 0, and with suffixes that nothing has (`_g`, `_v`: weight norm)."""
    known = re.compile(r"(weight(_packed|_scale|_g|_v)?|bias|[a-z_]*bias|gamma|beta)$")
    odd = [name for name in names if not name.strip(".") or name.startswith((".", "/")) or "/" in name]
    odd += [name for name in names if re.search(r"\.(experts|layers)\.0\d", name)]
    odd += [name for name in names if re.search(r"weight_?\w+$", name) and not known.search(name) and name not in alone]
    return odd
