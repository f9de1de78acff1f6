"""MXFP8: the numba encoder gives the bytes of the plain one, and refuses the same at the same index."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FP8, NUMBERS, block_fp8, every_code, float_blocks, generator

from kernels.errors import NonFiniteError
from kernels.formats import encode_mxfp8
from kernels.fp8 import decode_block_fp8
from kernels.mxfp8 import encode_matrix


def as_array(weight: torch.Tensor) -> np.ndarray:
    """In the form of kernels/arrays.py."""
    return weight.view({1: torch.uint8, 2: torch.uint16}[weight.element_size()]).numpy() if weight.dtype in (FP8, torch.bfloat16) else weight.numpy()


def compare(weight, scale=None, tile=(128, 128)):
    made = encode_matrix(as_array(weight), None if scale is None else scale.numpy(), tile)
    truth = encode_mxfp8(weight if scale is None else decode_block_fp8(weight, scale, tile))
    assert np.array_equal(made[0], truth.codes.view(torch.uint8).numpy()) and np.array_equal(made[1], truth.scale.numpy())
    np.testing.assert_allclose(made[2], [float(truth.signal), float(truth.error), float(truth.decoded)], rtol=1e-11)
    return truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in float_blocks() if name != "largest"])
def test_float_weights_are_encoded_alike(name, dtype):
    weight = float_blocks()[name].to(dtype)
    if torch.isfinite(weight).all():
        compare(weight)


@pytest.mark.parametrize("scale", [1.0, 0.7, 3e-4, 2.0**-126, 1e-40, 2.0**-149, 1e30, 5e35])
def test_every_fp8_code_is_encoded_alike(scale):
    compare(*every_code(scale))


@pytest.mark.parametrize("shape", [(1, 32), (129, 160), (5, 123 * 32), (300, 96)])
def test_ragged_shapes_are_encoded_alike(shape):
    compare(*block_fp8(shape))


@pytest.mark.parametrize("tile", [(1, 64), (64, 32), (7, 48), (1, 1000), (1000, 1000)])
def test_other_tile_sizes_are_encoded_alike(tile):
    codes, _ = block_fp8((130, 320))
    tiles = (math.ceil(130 / tile[0]), math.ceil(320 / tile[1]))
    compare(codes, torch.rand(tiles, generator=generator(4)) + 0.01, tile)


def test_ties_between_two_codes_go_to_the_even_one():
    values = NUMBERS.view(FP8).float()
    values = values[values >= 0].sort().values
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    near = torch.cat([middles, torch.nextafter(middles, torch.tensor(9e9)), torch.nextafter(middles, torch.tensor(-9e9))])
    weight = torch.zeros(len(near), 32)
    weight[:, 0], weight[:, 5], weight[:, 9] = 448.0, near, -near  # e = 0
    assert (compare(weight).scale == 127).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_fresh_weights_are_encoded_alike(data):
    rows, columns = data.draw(st.integers(1, 5)), 32 * data.draw(st.integers(1, 3))
    words = torch.tensor(data.draw(st.lists(st.integers(0, 0x7F77FFFF), min_size=8, max_size=8)), dtype=torch.int32)
    g = generator(data.draw(st.integers(0, 2**32 - 1)))
    weight = words[torch.randint(0, 8, (rows, columns), generator=g)].view(torch.float32)
    compare(torch.where(torch.rand(rows, columns, generator=g) < 0.5, -weight, weight))


def test_a_processor_mode_that_flushes_subnormals_changes_nothing():
    weight = float_blocks()["subnormal"]
    truth = encode_mxfp8(weight)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        made = encode_matrix(weight.numpy())
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(made[0], truth.codes.view(torch.uint8).numpy()) and np.array_equal(made[1], truth.scale.numpy())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38, 248 * 2.0**120])
def test_weights_that_no_code_can_hold_are_refused_at_their_index(value):
    weight = torch.ones(300, 4096)
    weight[299, 77] = value
    for encode in (lambda: encode_matrix(weight.numpy()), lambda: encode_mxfp8(weight)):
        with pytest.raises(NonFiniteError) as caught:
            encode()
        assert (caught.value.what, caught.value.index) == ("weight", (299, 77))
    weight[299, 77] = float(np.nextafter(np.float32(248 * 2.0**120), np.float32(0)))
    compare(weight)


def test_nan_codes_and_bad_scales_are_refused_at_their_index():
    codes, scale = block_fp8((130, 160))
    codes.view(torch.uint8)[129, 3] = 0xFF
    with pytest.raises(NonFiniteError) as caught:
        encode_matrix(as_array(codes), scale.numpy())
    assert caught.value.index == (129, 3)
    for bad in (0.0, -1.0, math.nan, math.inf):
        scale[1, 1] = bad
        with pytest.raises(NonFiniteError) as caught:
            encode_matrix(as_array(codes), scale.numpy())
        assert (caught.value.what, caught.value.index) == ("tile scale", (1, 1))
