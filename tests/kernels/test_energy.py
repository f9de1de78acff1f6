"""The sum of squares that proves a release is that of the reference's decoded weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import mxfp4
from kernels.energy import energy
from kernels.formats import decode_mxfp8


# scales from 12 to 243: there float32, which the decoders return, holds every value
def truth(codes: np.ndarray, scale: np.ndarray, scheme: str) -> float:
    packed, byte = torch.from_numpy(codes), torch.from_numpy(scale)
    if scheme == "mxfp4":
        return mxfp4.dequantize(packed, byte, backend="reference").double().square().sum().item()
    return decode_mxfp8(packed.view(torch.float8_e4m3fn), byte).double().square().sum().item()


@pytest.mark.parametrize("scheme, size", [("mxfp4", 16), ("mxfp8", 32)])
@given(least=st.integers(12, 236), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_energy_is_that_of_the_decoded_weights(scheme, size, least, seed, rows, blocks):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    if scheme == "mxfp8":
        codes[codes & 127 == 127] = 0
    scale = random.integers(least, least + 8, (rows, blocks), dtype=np.uint8)
    assert math.isclose(energy(codes, scale, scheme), truth(codes, scale, scheme), rel_tol=1e-12)


@pytest.mark.parametrize("scheme, size", [("mxfp4", 16), ("mxfp8", 32)])
def test_every_byte_counts(scheme, size):
    codes, scale = np.full((1, 2 * size), 0x22, np.uint8), np.full((1, 2), 127, np.uint8)
    before = energy(codes, scale, scheme)
    for position in range(2 * size):
        changed = codes.copy()
        changed[0, position] ^= 0x11
        assert energy(changed, scale, scheme) != before, position
    for block in range(2):
        changed = scale.copy()
        changed[0, block] += 1
        assert energy(codes, changed, scheme) == pytest.approx(before * 2.5, rel=1e-15)


def test_codes_and_scales_that_mean_nan_give_nan():
    assert math.isnan(energy(np.zeros((1, 16), np.uint8), np.array([[255]], np.uint8), "mxfp4"))
    assert math.isnan(energy(np.full((1, 32), 0xFF, np.uint8), np.array([[127]], np.uint8), "mxfp8"))


def test_the_energy_of_no_bytes_is_zero():
    assert energy(np.zeros((0, 16), np.uint8), np.zeros((0, 1), np.uint8), "mxfp4") == 0.0
