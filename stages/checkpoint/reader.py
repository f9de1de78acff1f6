"""Bounded reads from a shard: no memory map, because mapped pages count as resident memory and a shard has 9 GB.

Numbers come as numpy arrays, in the form of kernels/arrays.py, or as torch tensors; torch is imported for the latter only.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.checkpoint.files import CHUNK, memory, naming
from stages.checkpoint.header import Header, TensorInfo, read_header
from stages.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {  # safetensors' name -> numpy's type of the same bytes, torch's name
    "BOOL": (np.bool_, "bool"), "U8": (np.uint8, "uint8"), "I8": (np.int8, "int8"), "I16": (np.int16, "int16"),
    "I32": (np.int32, "int32"), "I64": (np.int64, "int64"), "F16": (np.float16, "float16"), "BF16": (np.uint16, "bfloat16"),
    "F32": (np.float32, "float32"), "F64": (np.float64, "float64"), "F8_E4M3": (np.uint8, "float8_e4m3fn"),
    "F8_E5M2": (np.uint8, "float8_e5m2"), "F8_E8M0": (np.uint8, "float8_e8m0fnu"),
}


def as_array(raw, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array that shares their memory, in the form of kernels/arrays.py."""
    return np.frombuffer(raw, DTYPES[dtype][0]).reshape(shape)


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """An array of `as_array` as a tensor that shares its memory."""
    import torch

    return torch.from_numpy(array).view(getattr(torch, DTYPES[dtype][1]))


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
            raise UserError(f"{self.path}: holds no tensor {name}; it is not the file that was expected") from None

    def _read(self, begin: int, end: int, buffer: memoryview | None = None) -> memoryview:
        """Bytes begin..end of the data section; in the caller's buffer if that is large enough, fresh memory costs more
        than the read itself."""
        if buffer is None or len(buffer) < end - begin:
            buffer = memoryview(bytearray(end - begin))
        view, position = buffer[:end - begin], begin
        while position < end:
            with naming(self.path):
                count = os.preadv(self._handle, [view[position - begin:]], self.header.data_start + position)
            if count == 0:
                raise UserError(f"{self.path}: ends {end - position} bytes early while being read; it changed after "
                                "its header was checked, download it again")
            position += count
        return view

    def head(self) -> bytes:
        """Everything before the data section: the header and its length."""
        with naming(self.path):
            return os.pread(self._handle, self.header.data_start, 0)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Raw bytes of a tensor, at most CHUNK at a time; each is valid until the next is asked for."""
        info = self.info(name)
        buffer = memory(min(CHUNK, info.nbytes))
        for begin in range(info.begin, info.end, CHUNK):
            yield self._read(begin, min(begin + CHUNK, info.end), buffer)

    def sha256(self, name: str) -> str:
        """sha256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Entries begin..end along the first dimension, as a tensor of its own memory."""
        info = self.info(name)
        assert 0 <= begin <= end <= info.shape[0], f"{name}: rows {begin}..{end} of {info.shape[0]}"
        stride = info.nbytes // info.shape[0] if info.shape[0] else 0
        raw = self._read(info.begin + begin * stride, info.begin + end * stride)
        return as_tensor(self._array(name, raw, (end - begin, *info.shape[1:])), info.dtype)

    def matrix_array(self, name: str, expert: int | None, begin: int, end: int, buffer: memoryview | None = None) -> np.ndarray:
        """Rows begin..end of a 2D tensor, or of matrix `expert` of a tensor that has experts first; shape [end - begin, in].

        What follows the rows' dimension is one row (gpt-oss stores blocks of a row in a dimension of their own). With
        `buffer` the array lies in it, where it fits, and is valid until the buffer is used again.
        """
        info = self.info(name)
        experts, rows = info.shape[:2] if expert is not None else (1, info.shape[0])
        assert 0 <= begin <= end <= rows and 0 <= (expert or 0) < experts, f"{name}: rows {begin}..{end} of matrix {expert} in {info.shape}"
        stride = info.nbytes // (experts * rows)
        start = info.begin + ((expert or 0) * rows + begin) * stride
        raw = self._read(start, start + (end - begin) * stride, buffer)
        return self._array(name, raw, (end - begin, math.prod(info.shape[1 if expert is None else 2:])))

    def matrix_rows(self, name: str, expert: int | None, begin: int, end: int) -> torch.Tensor:
        """`matrix_array` as a tensor."""
        return as_tensor(self.matrix_array(name, expert, begin, end), self.info(name).dtype)

    def array(self, name: str) -> np.ndarray:
        """All numbers of a tensor."""
        info = self.info(name)
        return self._array(name, self._read(info.begin, info.end), info.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        return as_tensor(self.array(name), self.info(name).dtype)

    def _array(self, name: str, raw: memoryview, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self.info(name).dtype
        if dtype not in DTYPES:
            raise UserError(f"{self.path.name}: tensor {name} has dtype {dtype}, which torch cannot hold; it can only pass through")
        return as_array(raw, dtype, shape)
