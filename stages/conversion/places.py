"""Reads the tensors that converting a shard needs: its own, and scales that lie in other shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from stages.checkpoint.header import TensorInfo
from stages.checkpoint.reader import ShardReader, as_array
from stages.dialects import Claim
from stages.errors import UserError
from stages.records import CensusTensor, Plan
from stages.settings import Settings
from stages.sources.listing import read_tensor_bytes

KEPT_BYTES = 64 << 20  # of scales from other shards that are kept in memory
INSPECT = "run download --metadata and inspect_format again"


def check_tensor(reader: ShardReader, shard: str, name: str, entry: CensusTensor) -> None:
    """UserError where a tensor is not what was inspected."""
    info = reader.info(name)
    if (info.dtype, list(info.shape)) != (entry["dtype"], entry["shape"]):
        raise UserError(f"{shard}: tensor {name} is {info.dtype} {list(info.shape)}, but was "
                        f"{entry['dtype']} {entry['shape']} when it was inspected; {INSPECT}")


class TensorInMemory:
    """A tensor that came whole into memory, with the methods of ShardReader that dialects use."""

    def __init__(self, array: np.ndarray, info: TensorInfo):
        self._array, self._info = array, info

    def info(self, name: str) -> TensorInfo:
        """Its dtype and shape."""
        return self._info

    def array(self, name: str) -> np.ndarray:
        """All of it."""
        return self._array

    def matrix_array(self, name: str, expert: int | None, begin: int, end: int, buffer: memoryview | None = None) -> np.ndarray:
        """Rows begin..end of one matrix, as ShardReader gives them."""
        rows = (self._array if expert is None else self._array[expert])[begin:end]
        return np.ascontiguousarray(rows.reshape(len(rows), -1))


def lent_by(plan: Plan, shard: str) -> list[str]:
    """Tensors of a shard that weights in other shards need."""
    tensors = plan["tensors"]
    return sorted({name for entry in tensors.values() if entry["shard"] != shard and entry["scheme"] for name in Claim.from_entry(entry).read_from()
                   if tensors[name]["shard"] == shard})


class Places:
    """Tensor name -> reader of it: the shard's own reader, or a scale of another shard, in memory.

    A tensor of another shard is read whole, from the local source or by a range request to the hub at the pinned revision,
    into memory; KEPT_BYTES of them are kept, because panels and experts ask for the same. Where headers.json does not fit what comes,
    the size of the file differs and the hub's answer is refused. What was used is hashed, and compared with what the other shard holds
    once that one has been converted, too (stages/receipts.py): the hub has no hash of a part of a file.
    """

    def __init__(self, settings: Settings, plan: Plan, shard: str, reader: ShardReader):
        self._settings, self._plan, self._shard, self._reader = settings, plan, shard, reader
        self._kept: dict[str, TensorInMemory] = {}
        self.borrowed: dict[str, str] = {}  # tensor of another shard -> sha256 of its bytes as they were used

    def __call__(self, name: str) -> ShardReader | TensorInMemory:
        stored = self._plan["tensors"][name]
        if stored["shard"] == self._shard:
            return self._reader
        if name not in self._kept:
            while self._kept and sum(self._plan["tensors"][kept]["bytes"] for kept in self._kept) + stored["bytes"] > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[name] = found = self._fetched(name, stored)
            digest = hashlib.sha256(found.array(name).tobytes()).hexdigest()
            if self.borrowed.setdefault(name, digest) != digest:
                raise UserError(f"{stored['shard']}: {name} changed while {self._shard} was converted; {INSPECT}")
        return self._kept[name]

    def _fetched(self, name: str, stored: CensusTensor) -> TensorInMemory:
        info = TensorInfo(stored["dtype"], tuple(stored["shape"]), 0, stored["bytes"])
        if self._settings.source.path:
            with ShardReader(Path(self._settings.source.path) / stored["shard"]) as other:
                check_tensor(other, stored["shard"], name, stored)
                return TensorInMemory(other.array(name), info)
        return TensorInMemory(as_array(bytearray(read_tensor_bytes(self._settings, stored["shard"], name)), info.dtype, info.shape), info)
