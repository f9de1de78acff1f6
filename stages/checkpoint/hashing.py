"""A thread that hashes streams of bytes side by side: a file, which it reads itself, and pieces of another that are handed to it.

SHA-256 is a chain of rounds that wait for each other. A core computes two or three chains in turn in little more time than one
(kernels/sha256.py), so a shard's source, its output and a tensor that passes through are hashed together, as far as they are there.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

from stages.checkpoint.files import memory, naming
from stages.errors import loading_kernels

PIECE_BYTES = 1 << 20  # of each stream in one go; what was read of a file still lies in a cache then


class Piece:
    """Bytes that stay as they are until `done`, and the digests that they belong to."""

    def __init__(self, data: memoryview, digests: list):
        self.data, self.digests, self.done = data, digests, Future()


class WholeFile:
    """A file that is read as it is hashed; `done` gets its hash."""

    def __init__(self, path: Path, digest):
        self.path, self.digests, self.done = path, [digest], Future()
        self.data = memoryview(b"")
        self._buffer = memory(PIECE_BYTES)
        self._handle = None

    def read_on(self) -> bool:
        """Reads the next bytes into `data` if it has none; False at the end of the file."""
        if not self.data:
            with naming(self.path):
                if self._handle is None:
                    self._handle = open(self.path, "rb", buffering=0)
                self.data = self._buffer[:self._handle.readinto(self._buffer)]
        return bool(self.data)

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._handle.close()


def one_by_one(updates: list) -> None:
    """hashlib's way to add bytes to several digests."""
    for digest, data in updates:
        digest.update(data)


class HashingThread:
    """`with HashingThread() as hashing:` the thread works until the block is left, and then ends, whether it is done or not.

    An error of reading the file is raised by all results that were not there yet, and by later calls.

    Args:
        new: makes a digest, as hashlib.sha256 does.
        together: adds bytes to several digests, from a list of pairs of both.
    """

    def __init__(self, new=hashlib.sha256, together=one_by_one):
        self.new, self._together = new, together
        self._change = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._file: WholeFile | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="hashing")

    def __enter__(self) -> HashingThread:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._change:
            self._ended = True
            self._change.notify()
        self._thread.join()

    def file(self, path: Path) -> Future:
        """64 hexadecimal digits of a file's sha256; one file in the life of the thread."""
        assert self._file is None, f"{self._file.path} is hashed here already"
        return self._take(WholeFile(path, self.new()))

    def put(self, data: memoryview, digests: list) -> Future:
        """Adds bytes to each of the digests, after those of earlier calls; they must not change before the result is there."""
        return self._take(Piece(data, digests))

    def _take(self, work: Piece | WholeFile) -> Future:
        with self._change:
            if self._error is not None:
                raise self._error
            if isinstance(work, Piece):
                self._pieces.append(work)
            else:
                self._file = work
            self._change.notify()
        return work.done

    def _unread(self) -> WholeFile | None:
        """The file, until its hash is there."""
        return None if self._file is None or self._file.done.done() else self._file

    def _work(self) -> None:
        try:
            while not self._ended:
                with self._change:
                    self._change.wait_for(lambda: self._ended or self._pieces or self._unread())
                    work = [self._pieces[0]] if self._pieces else []
                    file = self._unread()
                if file and file.read_on():
                    work.append(file)
                elif file:
                    file.done.set_result(file.digests[0].hexdigest())
                if work and not self._ended:
                    self._hash(work)
        except BaseException as error:
            with self._change:
                self._error = error
                for work in filter(None, (*self._pieces, self._unread())):
                    work.done.set_exception(error)
        finally:
            if self._file:
                self._file.close()

    def _hash(self, work: list) -> None:
        """Hashes as much of each as there is of all, at most PIECE_BYTES."""
        count = min(PIECE_BYTES, *(len(entry.data) for entry in work))
        self._together([(digest, entry.data[:count]) for entry in work for digest in entry.digests])
        for entry in work:
            entry.data = entry.data[count:]
            if isinstance(entry, Piece) and not entry.data:
                self._pieces.popleft()
                entry.done.set_result(None)


def hashing_threads(stack: ExitStack) -> tuple[HashingThread, HashingThread]:
    """For the source's hash and for the output's, in `stack`: one thread for both where the processor gains from it, else two with hashlib."""
    from kernels import sha256  # numba takes a moment

    if sha256.available():
        with loading_kernels():
            sha256.load()
        both = stack.enter_context(HashingThread(sha256.Sha256, sha256.update_together))
        return both, both
    return stack.enter_context(HashingThread()), stack.enter_context(HashingThread())
