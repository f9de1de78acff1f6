"""Writes a shard in one pass, never holding more than a few blocks of it, hashing as it goes.

The header comes first and is fixed by the plan (names, dtypes, shapes, order), so the size of the file is known before
the first byte and every tensor lands where it was promised. The file takes its name only when all of it is on disk.

Pieces are gathered in blocks; one thread hashes a full block (for the file, and for each tensor that asks for it; stages/checkpoint/hashing.py)
while another writes it and the caller fills the next: hashing and `write` release the interpreter lock. Blocks go to the disk past the page cache (O_DIRECT)
where the file system allows it: a release is larger than memory, so its pages would be evicted unread, and copying into fresh pages
took more processor time than converting what was in them. Every SYNC_BYTES a further thread asks for what is written to become
durable, so that the final sync finds little to do. Space is not reserved with fallocate: writing into reserved extents takes ext4
six times the processor time, and callers have checked the disk.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from stages.checkpoint.files import DIRECT, atomic_write, memory
from stages.checkpoint.hashing import HashingThread
from stages.checkpoint.header import DTYPE_BYTES, render_header

BLOCK_BYTES = 8 << 20  # a multiple of every page size, as direct writes need
BLOCKS = 3  # one is filled while one is hashed and written; a third covers for a slow one
SYNC_BYTES = 16 << 20  # written between two requests to make it durable


class Block:
    """Memory for BLOCK_BYTES of the file, aligned to pages, and which of them belong to which tensor's hash."""

    def __init__(self):
        self.memory = memory(BLOCK_BYTES)
        self.filled = 0
        self.parts: list[list] = []  # what lies where: the tensor's digest or None, begin, end
        self.pending: list[Future] = []


class ShardWriter:
    """`with ShardWriter(path, specs, metadata) as writer: writer.write(name, bytes_like)` for every tensor in order.

    A tensor may come in several pieces, which are copied; it must be complete before the next one starts. A write that failed (a
    full disk) raises its OSError at a later `write` or at the end of the `with`. After the `with`, `sha256` and `size` describe the
    file, and `tensor_sha256` its tensors, or those named in `hashed`. `hashing` does the hashing; made here where None.
    """

    def __init__(self, path: Path, specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict | None,
                 hashed: Container[str] | None = None, hashing: HashingThread | None = None):
        self.path = Path(path)
        self._remaining = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, dtype, shape in specs}
        self._order = iter([name for name, _, _ in specs])
        self._current: str | None = None
        self._header = render_header(list(specs), metadata)
        self._hashing = hashing
        self._hashed = hashed
        self._digests: dict = {}
        self._sync: Future | None = None
        self._unsynced = 0
        self.tensor_sha256: dict[str, str] = {}
        self.size = 0
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._file = stack.enter_context(atomic_write(self.path, direct=True)).fileno()
            # one thread each, so that what is handed over is done in order
            self._writing, self._syncing = (stack.enter_context(ThreadPoolExecutor(1, f"shard-{work}")) for work in ("write", "sync"))
            self._hashing = self._hashing or stack.enter_context(HashingThread())
            self._file_digest = self._hashing.new()
            self._blocks = [Block() for _ in range(BLOCKS)]
            self._fill(self._header, None)
            self._advance()
            self._stack = stack.pop_all()
        return self

    def _fill(self, data, digest) -> None:
        """Copies bytes into blocks and hands over those that are full."""
        position = 0
        while position < len(data):
            block = self._blocks[0]
            if not block.filled:
                _settle(block)
            count = min(len(data) - position, BLOCK_BYTES - block.filled)
            block.memory[block.filled:block.filled + count] = data[position:position + count]
            if block.parts and block.parts[-1][0] is digest:
                block.parts[-1][2] += count
            else:
                block.parts.append([digest, block.filled, block.filled + count])
            block.filled += count
            position += count
            if block.filled == BLOCK_BYTES:
                self._hand_over()
        self.size += len(data)

    def _hand_over(self) -> None:
        """Lets the current block be hashed and written, and takes the next one."""
        block = self._blocks.pop(0)
        data = block.memory[:block.filled]
        block.pending = [self._writing.submit(self._put, data)] + [
            self._hashing.put(data[begin:end], [self._file_digest] + [digest] * (digest is not None)) for digest, begin, end in block.parts]
        block.filled, block.parts = 0, []
        self._blocks.append(block)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncing.submit(os.fdatasync, self._file)
            self._unsynced = 0

    def _put(self, data: memoryview) -> None:
        if len(data) < BLOCK_BYTES:
            self._write_through_cache()  # the end of the file fills no page
        while data:
            try:
                data = data[os.write(self._file, data):]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._write_through_cache():
                    raise

    def _write_through_cache(self) -> bool:
        """Goes on with ordinary writes; False if they were ordinary already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)

    def _advance(self) -> None:
        """Closes the current tensor and opens the next; empty tensors are closed at once."""
        while True:
            name = self._current = next(self._order, None)
            if name is not None and (self._hashed is None or name in self._hashed):
                self._digests[name] = self._hashing.new()
            if name is None or self._remaining[name]:
                return

    def write(self, name: str, data) -> None:
        """Appends bytes of tensor `name`; writing out of order or too much is a bug and raises AssertionError."""
        data = memoryview(data).cast("B")
        if not data:
            return
        assert name == self._current, f"{self.path.name}: expected {self._current}, got {name}"
        assert len(data) <= self._remaining[name], f"{name}: {len(data) - self._remaining[name]} bytes too many"
        self._fill(data, self._digests.get(name))
        self._remaining[name] -= len(data)
        if not self._remaining[name]:
            self._advance()

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # waits for the threads before the file takes its name; an error here removes it
            if self._current is not None:
                raise AssertionError(f"{self.path.name}: closed before tensor {self._current} was complete")
            if self._blocks[0].filled:
                self._hand_over()
            for block in self._blocks:
                _settle(block)
            if self._sync is not None:
                self._sync.result()
        self.tensor_sha256 = {name: digest.hexdigest() for name, digest in self._digests.items()}
        self.sha256 = self._file_digest.hexdigest()


def _settle(block: Block) -> None:
    """Waits until a block is hashed and written; raises what a thread raised."""
    pending, block.pending = block.pending, []
    for future in pending:
        future.result()
