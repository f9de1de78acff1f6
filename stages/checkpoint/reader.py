"""Bounded reads from a shard: no memory map, because mapped pages count as resident memory and a shard has 9 GB."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from stages.checkpoint.files import CHUNK
from stages.checkpoint.header import Header, TensorInfo, read_header
from stages.errors import UserError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}


class ShardReader:
    """Reads tensors, slices of tensors and raw bytes of one shard with `pread`. Close it, or use it in a `with`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.header: Header = read_header(self.path)
        self._handle = os.open(self.path, os.O_RDONLY)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file handle."""
        os.close(self._handle)

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor; UserError when the shard does not hold it."""
        try:
            return self.header.tensors[name]
        except KeyError:
            raise UserError(f"{self.path.name}: tensor {name} is not in the shard; run inspect_format again") from None

    def _read(self, begin: int, end: int, buffer: bytearray | None = None) -> memoryview:
        """Bytes begin..end of the data section; in the caller's buffer if that is large enough, fresh memory costs more
        than the read itself."""
        if buffer is None or len(buffer) < end - begin:
            buffer = bytearray(end - begin)
        view, position = memoryview(buffer)[:end - begin], begin
        while position < end:
            count = os.preadv(self._handle, [view[position - begin:]], self.header.data_start + position)
            if count == 0:
                raise UserError(f"{self.path}: ends {end - position} bytes early while being read; it changed after "
                                "its header was checked, download it again")
            position += count
        return view

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Raw bytes of a tensor, at most CHUNK at a time.

        Two buffers alternate: a chunk stays valid until the next but one is asked for, so that it can be written meanwhile.
        """
        info = self.info(name)
        buffers = [bytearray(min(CHUNK, info.nbytes)), bytearray(min(CHUNK, max(0, info.nbytes - CHUNK)))]
        for number, begin in enumerate(range(info.begin, info.end, CHUNK)):
            yield self._read(begin, min(begin + CHUNK, info.end), buffers[number % 2])

    def sha256(self, name: str) -> str:
        """sha256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Entries begin..end along the first dimension, as a tensor of its own memory."""
        info = self.info(name)
        stride = info.nbytes // info.shape[0] if info.shape[0] else 0
        raw = self._read(info.begin + begin * stride, info.begin + end * stride)
        return self._tensor(name, raw, (end - begin, *info.shape[1:]))

    def matrix_rows(self, name: str, expert: int | None, begin: int, end: int,
                    buffer: bytearray | None = None) -> torch.Tensor:
        """Rows begin..end of a 2D tensor, or of matrix `expert` of a tensor that has experts first; shape [end - begin, in].

        What follows the rows' dimension is one row (gpt-oss stores blocks of a row in a dimension of their own). With
        `buffer` the tensor lies in it, where it fits, and is valid until the buffer is used again.
        """
        info = self.info(name)
        experts, rows = info.shape[:2] if expert is not None else (1, info.shape[0])
        stride = info.nbytes // (experts * rows)
        start = info.begin + ((expert or 0) * rows + begin) * stride
        raw = self._read(start, start + (end - begin) * stride, buffer)
        return self._tensor(name, raw, (end - begin, math.prod(info.shape[1 if expert is None else 2:])))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        info = self.info(name)
        return self._tensor(name, self._read(info.begin, info.end), info.shape)

    def _tensor(self, name: str, raw: memoryview, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = TORCH_DTYPES.get(self.info(name).dtype)
        if dtype is None:
            raise UserError(f"{self.path.name}: tensor {name} has dtype {self.info(name).dtype}, which torch cannot "
                            "hold; it can only pass through")
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)
