"""The bytes are the right ones: optimal exponents, specified rounding, the known signal-to-noise ratio."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FP8, MIDPOINTS, block_fp8, float_blocks, generator

from kernels.fp8 import decode_block_fp8
from kernels.mxfp4 import dequantize, quantize
from kernels.mxfp4.reference import BLOCK, floor_log2, round_to_code

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nibbles(packed):
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def exhaustive(weight: torch.Tensor) -> torch.Tensor:
    """Scale bytes uint8 [..., out, in/32] with the least squared error over ALL exponents -127..127.

    Ties go to the smaller |change| from e0, then up, as in `mse`. Errors are compared as Python integers, so neither a
    candidate list nor float rounding can hide a better exponent. Slow: keep it below some thousand blocks.
    """
    blocks = weight.to(torch.float64).reshape(-1, BLOCK)
    scales = torch.empty(len(blocks), dtype=torch.uint8)
    doubled = [0, 1, 2, 3, 4, 6, 8, 12]
    for i, block in enumerate(blocks):
        amax = float(block.abs().max())
        e0 = max(int(floor_log2(torch.tensor(amax, dtype=torch.float64))) - 2, -127)
        units = [int(x) for x in (block.abs() * 2.0**149).tolist()]  # float32 weights are whole multiples of 2^-149
        best = None
        for e in sorted(range(-127, 128), key=lambda e: (abs(e - e0), e < e0)):
            codes = round_to_code(block.abs() * 2.0**-e).tolist()
            error = sum((x - (doubled[c] << (e + 148))) ** 2 for x, c in zip(units, codes))
            if best is None or error < best[0]:
                best = (error, e)
        scales[i] = best[1] + 127
    return scales.reshape(*weight.shape[:-1], weight.shape[-1] // BLOCK)


@pytest.mark.parametrize("name", float_blocks())
def test_no_exponent_has_less_error_than_the_chosen_one(name):
    weight = float_blocks()[name]
    chosen = quantize(weight).scale
    best = exhaustive(weight)
    assert torch.equal(chosen, best), f"{(chosen != best).sum()} of {best.numel()} exponents"


def test_no_exponent_has_less_error_on_fp8_weights():
    codes, scale = block_fp8((40, 192))
    assert torch.equal(quantize(codes, scale).scale, exhaustive(decode_block_fp8(codes, scale)))


@given(st.lists(st.sampled_from([0.25, 0.5, 0.24, 1.0, 3.0, 4.0, 5.0, 7.0, 0.0]), min_size=32, max_size=32))
@settings(max_examples=40, deadline=None)
def test_no_exponent_has_less_error_on_contrived_blocks(values):
    weight = torch.tensor([values])
    assert torch.equal(quantize(weight).scale, exhaustive(weight))


def test_a_lone_four_among_quarters_takes_the_smaller_exponent():
    weight = torch.full((1, 32), 0.25)
    weight[0, 0] = 4.0
    assert int(quantize(weight).scale) == 127 - 1  # e0 = 0: 31 quarters would become zeros


def test_gaussian_weights_keep_19_05_db():
    made = quantize(torch.randn(1024, 4096, generator=generator(7)))
    ratio = 10 * math.log10(float(made.signal / made.error))
    assert abs(ratio - 19.05) < 0.01, f"{ratio:.4f} dB"


def test_statistics_are_those_of_the_decoded_weights():
    codes, scale = block_fp8((2, 130, 160))
    made = quantize(codes, scale)
    weight, decoded = decode_block_fp8(codes, scale).double(), dequantize(made.packed, made.scale).double()
    for got, wanted, tolerance in ((made.signal, weight**2, 1e-6), (made.error, (weight - decoded) ** 2, 1e-6), (made.decoded, decoded**2, 1e-12)):
        torch.testing.assert_close(got, wanted.sum((1, 2)), rtol=tolerance, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_round_to_the_even_code_and_large_values_saturate(sign):
    block = torch.zeros(1, 32)
    block[0, 0] = 7.9  # ocp_floor: e = 0
    block[0, 1:8] = torch.tensor(MIDPOINTS)
    block[0, 8:15] = torch.nextafter(torch.tensor(MIDPOINTS), torch.tensor(9.0))
    block[0, 15:22] = torch.nextafter(torch.tensor(MIDPOINTS), torch.tensor(0.0))
    codes = nibbles(quantize(block * sign, rule="ocp_floor").packed)[0]
    bit = 8 if sign < 0 else 0
    assert codes[:22].tolist() == [bit + c for c in [7, 0, 2, 2, 4, 4, 6, 6, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]]


def test_zero_blocks_get_scale_byte_zero_and_keep_their_signs():
    block = torch.tensor([[0.0, -0.0] * 16])
    for rule in ("mse", "ocp_floor", "even", "rceil"):
        for made in (quantize(block, rule=rule), quantize(block.to(FP8), torch.ones(1, 1), rule=rule)):
            assert made.scale.tolist() == [[0]] and made.packed.unique().tolist() == [0x80]
            assert torch.equal(dequantize(made.packed, made.scale).signbit(), block.signbit())


def test_the_sign_of_values_that_round_to_zero_is_kept():
    block = torch.full((1, 32), -1e-3)
    block[0, 0] = 6.0
    assert nibbles(quantize(block).packed)[0].tolist() == [7] + [8] * 31


def test_the_low_nibble_is_the_even_column():
    block = torch.zeros(1, 32)
    block[0, 0], block[0, 1] = 6.0, 0.5
    assert int(quantize(block).packed[0, 0]) == 7 | 1 << 4


@pytest.mark.parametrize("amax, even, rceil", [(4.0, 0, 0), (5.99, 0, 0), (6.0, 0, 0), (6.01, 0, 1), (6.99, 0, 1), (7.0, 1, 1), (7.9, 1, 1)])
def test_even_and_rceil_step_up_where_their_formulas_say(amax, even, rceil):
    block = torch.zeros(1, 32)
    block[0, 5] = -amax
    assert int(quantize(block, rule="even").scale) - 127 == even
    assert int(quantize(block, rule="rceil").scale) - 127 == rceil
    assert int(quantize(block, rule="ocp_floor").scale) - 127 == 0


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 125, 126, 127, 128, 251, 252])
def test_every_nibble_decodes_exactly_at_the_scale_boundaries(scale):
    packed = torch.arange(16, dtype=torch.uint8).reshape(1, 16) | (torch.arange(16, dtype=torch.uint8).reshape(1, 16) << 4)
    decoded = dequantize(packed, torch.full((1, 1), scale, dtype=torch.uint8))
    wanted = [(-1.0) ** (c > 7) * VALUES[c & 7] * 2.0 ** (scale - 127) for c in range(16) for _ in (0, 1)]
    assert decoded[0].double().tolist() == wanted
