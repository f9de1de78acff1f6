"""Digests of streams that are hashed side by side are hashlib's, however the bytes come."""

import hashlib

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sha256

needs_instructions = pytest.mark.skipif(not sha256.available(), reason="this processor has no SHA instructions; hashlib is used")


def test_constants_are_those_of_the_standard():
    """FIPS 180-4 prints them in 4.2.2 and 5.3.3; the ends of both lists."""
    assert (sha256.INITIAL[0], sha256.INITIAL[7]) == (0x6A09E667, 0x5BE0CD19)
    assert (sha256.CONSTANTS[0], sha256.CONSTANTS[63]) == (0x428A2F98, 0xC67178F2)
    assert (len(sha256.INITIAL), len(sha256.CONSTANTS)) == (8, 64)


@needs_instructions
@given(st.lists(st.lists(st.integers(0, 400), max_size=6), min_size=1, max_size=7), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_digests_are_hashlibs_for_any_pieces(streams, seed):
    """Pieces of any length, so that they end anywhere in a block; streams of unequal number, length and end."""
    random = np.random.default_rng(seed)
    ours, theirs = [sha256.Sha256() for _ in streams], [hashlib.sha256() for _ in streams]
    for turn in range(max(map(len, streams))):
        updates = []
        for digest, other, lengths in zip(ours, theirs, streams):
            if turn < len(lengths):
                updates.append((digest, random.bytes(lengths[turn])))
                other.update(updates[-1][1])
        sha256.update_together(updates)
        assert [digest.hexdigest() for digest in ours] == [other.hexdigest() for other in theirs]  # asking changes nothing


@needs_instructions
@pytest.mark.parametrize("length", range(0, 200))
def test_padding_is_right_at_every_length(length):
    data = bytes(range(length))
    digest = sha256.Sha256()
    digest.update(data)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


@needs_instructions
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_long_streams_from_unaligned_memory_are_hashed_right(streams):
    """Many blocks in one call, at addresses that are multiples of nothing, read-only ones among them."""
    memory = np.random.default_rng(streams).integers(0, 256, 4 << 20, dtype=np.uint8)
    memory.flags.writeable = False
    data = [memory[1 + 3 * stream:(1 << 20) * (stream + 1) - stream] for stream in range(streams)]
    digests = [sha256.Sha256() for _ in data]
    sha256.update_together(list(zip(digests, data)))
    assert [digest.hexdigest() for digest in digests] == [hashlib.sha256(part).hexdigest() for part in data]


@pytest.mark.parametrize("setting", ["CPU_NAME", "CPU_FEATURES"])
def test_code_for_another_processor_is_not_asked_for_instructions(setting, monkeypatch):
    """LLVM ends the process where it is told to use an instruction that the named processor lacks."""
    monkeypatch.setattr(numba.config, setting, "generic")
    assert not sha256.available.__wrapped__()
