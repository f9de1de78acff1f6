"""Writes a shard in one pass, never holding more than a piece of a tensor, hashing as it goes.

The header comes first and is fixed by the plan (names, dtypes, shapes, order), so the size of the file is known before
the first byte and every tensor lands where it was promised. The file takes its name only when all of it is on disk.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

from stages.checkpoint.files import atomic_write
from stages.checkpoint.header import DTYPE_BYTES, render_header


class ShardWriter:
    """`with ShardWriter(path, specs, metadata) as writer: writer.write(name, bytes_like)` for every tensor in order.

    A tensor may come in several pieces; it must be complete before the next one starts. After the `with`,
    `sha256`, `size` and `tensor_sha256` describe what was written.
    """

    def __init__(self, path: Path, specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict | None):
        self.path = Path(path)
        self._specs = list(specs)
        self._remaining = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, dtype, shape in specs}
        self._order = iter([name for name, _, _ in specs])
        self._current: str | None = None
        self._header = render_header(self._specs, metadata)
        self._file_digest = hashlib.sha256()
        self.tensor_sha256: dict[str, str] = {}
        self.size = 0
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._context = atomic_write(self.path)
        self._file = self._context.__enter__()
        expected = len(self._header) + sum(self._remaining.values())
        try:
            if expected:
                os.posix_fallocate(self._file.fileno(), 0, expected)  # a full disk shows now, not after an hour
            self._put(self._header)
            self._advance()
        except BaseException as error:
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _put(self, data) -> None:
        self._file.write(data)
        self._file_digest.update(data)
        self.size += len(data)

    def _advance(self) -> None:
        """Closes the current tensor and opens the next; empty tensors are closed at once."""
        while True:
            if self._current is not None:
                self.tensor_sha256[self._current] = self._digest.hexdigest()
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
        self._put(data)
        self._digest.update(data)
        self._remaining[name] -= len(data)
        if not self._remaining[name]:
            self._advance()

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self._current is not None:
            error = AssertionError(f"{self.path.name}: closed before tensor {self._current} was complete")
            kind, trace = type(error), None
            self._context.__exit__(kind, error, trace)
            raise error
        self._context.__exit__(kind, error, trace)
        self.sha256 = self._file_digest.hexdigest()
