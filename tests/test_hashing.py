"""The thread that hashes a file and what is handed to it: hashlib's digests, errors where they are asked for, and an end in any state."""

import hashlib
import os
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest

from kernels import sha256
from stages.checkpoint import hashing
from stages.checkpoint.hashing import HashingThread, hashing_threads
from stages.settings import PROJECT

needs_instructions = pytest.mark.skipif(not sha256.available(), reason="this processor has no SHA instructions; hashlib is used")
KINDS = [pytest.param((), id="hashlib"), pytest.param((sha256.Sha256, sha256.update_together), id="together", marks=needs_instructions)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("file_bytes", "piece_bytes"), [(0, [5]), (5_000_000, []), (3_000_001, [1, 700_000, 64, 2_000_003]), (10, [1 << 20] * 4)])
def test_a_file_and_pieces_are_hashed_side_by_side(kind, file_bytes, piece_bytes, tmp_path):
    random = np.random.default_rng(0)
    path, whole = tmp_path / "file", random.bytes(file_bytes)
    path.write_bytes(whole)
    pieces = [random.bytes(count) for count in piece_bytes]
    with HashingThread(*kind) as thread:
        digest, odd = thread.new(), thread.new()
        done = [thread.put(memoryview(pieces[0]), [digest])] if pieces else []
        of_file = thread.file(path)
        done += [thread.put(memoryview(piece), [digest, odd] if number % 2 else [digest]) for number, piece in enumerate(pieces[1:], 1)]
        assert [future.result() for future in done] == [None] * len(pieces)
        assert of_file.result() == hashlib.sha256(whole).hexdigest()
    assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert odd.hexdigest() == hashlib.sha256(b"".join(pieces[1::2])).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_named_and_ends_all(kind, tmp_path):
    with HashingThread(*kind) as thread:
        with pytest.raises(FileNotFoundError) as raised:
            thread.file(tmp_path / "none").result()
        assert raised.value.filename == str(tmp_path / "none")
        with pytest.raises(FileNotFoundError):
            thread.put(memoryview(b"1234"), [thread.new()]).result()


def test_the_thread_ends_with_its_block_while_there_is_work_left(tmp_path):
    """A failure elsewhere shows at once, not after 200 GB: what waits is not begun."""
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no room
    with HashingThread() as thread:
        of_file, piece = thread.file(path), thread.put(memoryview(bytes(1 << 20)), [thread.new()])
        assert piece.result() is None
    assert not thread._thread.is_alive() and not of_file.done()


def test_streams_share_a_thread_only_where_they_gain_from_it(monkeypatch):
    with ExitStack() as stack:
        source, output = hashing_threads(stack)
        assert (source is output) == sha256.available()
    monkeypatch.setattr(sha256, "available", lambda: False)
    with ExitStack() as stack:
        source, output = hashing_threads(stack)
        assert source is not output and source.new is output.new is hashlib.sha256


@needs_instructions
def test_damaged_compiled_kernels_are_one_line(tmp_path):
    """A full disk or a kill while numba wrote its cache."""
    code = ("from contextlib import ExitStack\nfrom stages.checkpoint.hashing import hashing_threads\nfrom stages.errors import exit_with_one_line\n"
            "@exit_with_one_line\ndef main():\n    with ExitStack() as stack:\n        hashing_threads(stack)\nmain()")

    def run():
        return subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)

    assert run().returncode == 0
    indexes = list(tmp_path.rglob("sha256.*.nbi"))
    assert len(indexes) == len(sha256.KERNELS)
    for index in indexes:
        index.write_bytes(index.read_bytes()[:20])
    ran = run()
    assert ran.returncode == 1 and ran.stderr.startswith(f"error: {tmp_path}") and "damaged" in ran.stderr and ran.stderr.count("\n") == 1


def test_pieces_are_of_whole_blocks():
    assert hashing.PIECE_BYTES % sha256.BLOCK_BYTES == 0
