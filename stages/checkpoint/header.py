"""Strict reading and exact rendering of safetensors headers, without touching tensor data.

A safetensors file is an 8-byte little-endian length n, n bytes of JSON, then the tensors' bytes without holes:

    {"__metadata__": {...}, "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

The library reads headers, too, but gives no byte offsets, cannot take a header that came over HTTP, and tells a user little
about a damaged file. Every way in which a file can lie about itself is refused here with one line that names it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stages.errors import UserError

FLOATS = ("F32", "BF16", "F16")  # of weights that are not quantized, and of scales
# bytes per element, listed as the format's own writer ranks dtypes: it lays tensors out from the last to the first
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
               "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}
MAXIMUM_HEADER = 100_000_000  # bytes; the format's own limit
MAXIMUM_RANK = 64  # dimensions; torch's own limit, and a product of more would be arithmetic on request of a stranger
LFS_POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"  # of a checkpoint of several files: which tensor is in which


@dataclass(frozen=True)
class TensorInfo:
    """One header entry: dtype as the file spells it, shape, and byte offsets from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """All entries of one file. `data_start` is where the data section begins: 8 + length of the JSON."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None
    data_start: int
    file_size: int


def _storable(text: str) -> bool:
    """Whether a name can be written as UTF-8; JSON can spell half a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"key {next(k for k, _ in pairs if k in seen or seen.add(k))!r} occurs twice")
    return result


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Length in bytes of the JSON, from a file's first bytes (at least 8 of them where the file has so many); UserError that begins with `where` for
    what is no safetensors file, or not all of one."""
    if prefix.startswith(LFS_POINTER):
        raise UserError(f"{where}: is a Git LFS pointer, not the data; run git lfs pull or download the file itself")
    if file_size < 8 or len(prefix) < 8:
        raise UserError(f"{where}: has {file_size} bytes, too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAXIMUM_HEADER:
        raise UserError(f"{where}: claims a header of {length} bytes, the format allows {MAXIMUM_HEADER}; this is no "
                        "safetensors file")
    if 8 + length > file_size:
        raise UserError(f"{where}: its header needs {8 + length} bytes, the file has {file_size}; it is truncated, "
                        "download it again")
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Header from its JSON bytes (without the 8 bytes of length) and the size of the whole file in bytes.

    Raises UserError, one line that begins with `where`, for anything irregular: the JSON comes from a stranger, and what is
    accepted here is later used as offsets, file names and report text without another look.
    """
    def fail(what: str, remedy: str = "the file is damaged, download it again") -> NoReturn:
        raise UserError(f"{where}: {what}; {remedy}")

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        fail(f"its header is not valid JSON ({str(error)[:120]})")
    if not raw.startswith(b"{") or not isinstance(table, dict):
        fail("its header does not begin with {")
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict)
                                     and all(isinstance(text, str) and _storable(text)
                                             for item in metadata.items() for text in item)):
        fail("__metadata__ holds something else than strings")
    header = Header({name: _checked_entry(name, entry, fail) for name, entry in table.items()}, metadata, 8 + len(raw), file_size)
    _check_layout(header, fail)
    return header


def _checked_entry(name: str, entry: object, fail: Callable[..., NoReturn]) -> TensorInfo:
    """A tensor's entry of the JSON; calls `fail` where its name, dtype, shape or offsets are not what the format allows."""
    if "\0" in name or not _storable(name):
        fail(f"tensor name {name[:80]!r} holds a NUL or half a surrogate pair")
    shown = name[:200] if name[:200].isprintable() else repr(name[:200])  # a message stays one readable line
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail(f"the entry of tensor {shown} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail(f"tensor {shown} has dtype {str(dtype)[:40]!r}, which is not known", f"known are {', '.join(DTYPE_BYTES)}")
    whole = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if (len(whole) == 1 or len(offsets) != 2 or len(shape) > MAXIMUM_RANK
            or not all(type(number) is int and 0 <= number < 2**63 for number in whole)):
        fail(f"tensor {shown} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        fail(f"tensor {shown} takes {end - begin} bytes, but {dtype} {shape} needs {needed}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_layout(header: Header, fail: Callable[..., NoReturn]) -> None:
    """Calls `fail` unless the tensors fill the data section one behind the other, without holes or overlaps, to the end of the file."""
    position = 0
    for name, info in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            fail(f"tensor {name[:200]!r} begins at {info.begin} and {kind}, which ends at {position}")
        position = info.end
    described = header.data_start + position
    if described != header.file_size:
        what = "is truncated" if header.file_size < described else "has bytes after the last tensor"
        fail(f"{what}: {header.file_size} bytes, its header describes {described}")


def read_header(path: Path) -> Header:
    """Header of a file on disk; reads the header only, raises what `parse_header` raises."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = header_length(file.read(len(LFS_POINTER)), size, str(path))
        file.seek(8)
        raw = file.read(length)
    return parse_header(raw, size, str(path))


def sorted_specs(specs: list[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) in the order of the format's own writer: dtype size descending, then name.

    Dtypes of one size do not mix in that order, either: BF16 comes before F16, F8 before U8, as DTYPE_BYTES ranks them.
    """
    return sorted(specs, key=lambda spec: (-DTYPE_RANK[spec[1]], spec[0]))


def render_header(specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """The 8-byte length and the JSON for (name, dtype, shape) laid out without holes in exactly this order.

    Byte-identical with what the safetensors library writes for the same order: compact, `__metadata__` first and in the
    caller's key order, padded with spaces to whole 8 bytes. Its length is what `plan` predicts file sizes with.
    """
    table: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
