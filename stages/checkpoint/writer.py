"""Writes a shard in one pass, never holding more than a piece of a tensor, hashing as it goes.

The header comes first and is fixed by the plan (names, dtypes, shapes, order), so the size of the file is known before
the first byte and every tensor lands where it was promised. The file takes its name only when all of it is on disk.

Writing and the two hashes (of the file and of the tensor) run in threads while the caller prepares the next piece: hashlib
and `write` release the interpreter lock. One piece is in flight, so memory stays bounded and order needs no bookkeeping.
Every SYNC_BYTES a further thread asks for what is written to reach the disk, so that the final sync finds little to do.
Space is not reserved with fallocate: writing into reserved extents takes ext4 six times the processor time, and callers have
checked the disk.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stages.checkpoint.files import atomic_write
from stages.checkpoint.header import DTYPE_BYTES, render_header

THREAD_BYTES = 1 << 16  # below this, handing a piece to a thread costs more than hashing it
SYNC_BYTES = 16 << 20  # written between two requests to put them on disk


class ShardWriter:
    """`with ShardWriter(path, specs, metadata) as writer: writer.write(name, bytes_like)` for every tensor in order.

    A tensor may come in several pieces; it must be complete before the next one starts. A piece must stay unchanged until
    the next `write` returns or the `with` ends. A write that failed (a full disk) raises its OSError at a later `write` or at
    the end of the `with`. After the `with`, `sha256`, `size` and `tensor_sha256` describe what was written.
    """

    def __init__(self, path: Path, specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict | None):
        self.path = Path(path)
        self._specs = list(specs)
        self._remaining = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, dtype, shape in specs}
        self._order = iter([name for name, _, _ in specs])
        self._current: str | None = None
        self._header = render_header(self._specs, metadata)
        self._file_digest = hashlib.sha256()
        self._digests: dict[str, hashlib._Hash] = {}
        self._pending: list[Future] = []
        self._sync: Future | None = None
        self._unsynced = 0
        self.tensor_sha256: dict[str, str] = {}
        self.size = 0
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._context = atomic_write(self.path)
        self._file = self._context.__enter__()
        self._threads = ThreadPoolExecutor(3, "shard-writer")
        try:
            self._put(self._header)
            self._advance()
        except BaseException as error:
            self._threads.shutdown()
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _put(self, data) -> None:
        self._file.write(data)
        self._file_digest.update(data)
        self.size += len(data)

    def _settle(self) -> None:
        """Waits for the piece in flight; raises what its thread raised."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _sync_now_and_then(self, count: int) -> None:
        self._unsynced += count
        if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._sync = self._threads.submit(os.fdatasync, self._file.fileno())
            self._unsynced = 0

    def _advance(self) -> None:
        """Closes the current tensor and opens the next; empty tensors are closed at once."""
        while True:
            if self._current is not None:
                self._digests[self._current] = self._digest
            self._current = next(self._order, None)
            self._digest = hashlib.sha256()
            if self._current is None or self._remaining[self._current]:
                return

    def write(self, name: str, data) -> None:
        """Appends bytes of tensor `name`; writing out of order or too much is a bug and raises AssertionError."""
        data = memoryview(data).cast("B")
        if not data:
            return
        assert name == self._current, f"{self.path.name}: expected {self._current}, got {name}"
        assert len(data) <= self._remaining[name], f"{name}: {len(data) - self._remaining[name]} bytes too many"
        self._settle()
        if len(data) < THREAD_BYTES:
            self._put(data)
            self._digest.update(data)
        else:
            self._pending = [self._threads.submit(self._put, data), self._threads.submit(self._digest.update, data)]
        self._sync_now_and_then(len(data))
        self._remaining[name] -= len(data)
        if not self._remaining[name]:
            self._advance()

    def __exit__(self, kind, error, trace) -> None:
        self._threads.shutdown()  # waits: no thread may touch the file once it is closed
        if kind is None:
            try:
                self._settle()
                if self._sync is not None:
                    self._sync.result()
                if self._current is not None:
                    raise AssertionError(f"{self.path.name}: closed before tensor {self._current} was complete")
            except BaseException as failure:
                self._context.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._context.__exit__(kind, error, trace)
        self.tensor_sha256 = {name: digest.hexdigest() for name, digest in self._digests.items()}
        self.sha256 = self._file_digest.hexdigest()
