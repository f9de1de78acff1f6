"""The CPU backend writes the reference's bytes, whatever the weights."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import block_fp8, compare, every_code, float_blocks, generator

from kernels.mxfp4 import RULES, dequantize, quantize

SCALES = [1.0, 0.7, 3e-4, 2.0**-126, 3.1e-38, 1e-40, 3e-43, 2.0**-149, 1e30, 7.5e35, 100.0, 127.99, 128.0]
SCALES += [1.17 * 2.0**-117, 0.99 * 2.0**-117, 2.0**112, 1.01 * 2.0**112]  # where the cpu kernel goes from tables to panels


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", float_blocks())
def test_float_weights_convert_alike_on_every_backend(name, rule):
    weight = float_blocks()[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        converted = weight.to(dtype)
        if torch.isfinite(converted).all():
            compare("cpu", "cpu", converted, name=name, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_fp8_code_under_every_kind_of_scale_converts_alike(scale, rule):
    compare("cpu", "cpu", *every_code(scale), name=f"scale {scale}", rule=rule)


@pytest.mark.parametrize("shape", [(1, 32), (128, 128), (129, 160), (5, 123 * 32), (3, 200, 288), (2, 1, 32), (2, 256, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_ragged_shapes_convert_alike(shape, rule):
    compare("cpu", "cpu", *block_fp8(shape), name=str(shape), rule=rule)


@pytest.mark.parametrize("tile", [(128, 128), (1, 64), (64, 32), (1, 32), (7, 48), (1000, 1000), (300, 320)])
def test_other_tile_sizes_convert_alike(tile):
    codes, _ = block_fp8((130, 320))
    tiles = (-(-130 // tile[0]), -(-320 // tile[1]))
    compare("cpu", "cpu", codes, torch.rand(tiles, generator=generator(4)) + 0.01, name=str(tile), tile=tile)


def balanced_blocks(count: int) -> torch.Tensor:
    """float32 [count * 7, 32]: the largest element makes e0 + 1 as good as e0, to within a few units in the last place."""
    values = torch.rand(count, 32, generator=generator(8), dtype=torch.float64) * 2
    tents = (0.25 - ((values - 1).abs() - 0.5).abs()).clamp(min=0)[:, 1:].sum(1)
    values[:, 0] = 7 + tents / 4  # 4 (u - 7) = sum of tents
    values = values[values[:, 0] < 8].to(torch.float32)
    variants = []
    for steps in range(-3, 4):
        moved = values.clone()
        moved[:, 0] = (moved[:, 0].view(torch.int32) + steps).view(torch.float32)
        variants.append(moved)
    return torch.cat(variants)


def test_blocks_with_two_exponents_that_are_almost_equal_are_decided_exactly():
    blocks = balanced_blocks(4000)
    assert len(blocks) > 7000
    made = compare("cpu", "cpu", blocks, name="balanced")
    ups = (made.scale == 128).sum()
    assert 0.2 < ups / len(blocks) < 0.8  # both decisions occur


def test_narrow_scale_dtypes_are_converted_exactly():
    codes, scale = block_fp8((130, 160), magnitude=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = compare("cpu", "cpu", codes, scale.to(dtype))
        wide = quantize(codes, scale.to(dtype).float())
        assert torch.equal(narrow.packed, wide.packed)


def test_importance_picks_the_same_bytes_on_every_backend_and_lowers_the_weighted_error():
    weight = float_blocks()["heavy_tailed"]
    g = generator(6)
    for power in (1, 4):
        importance = torch.rand(96, generator=g) ** power * (torch.rand(96, generator=g) > 0.2)
        made = compare("cpu", "cpu", weight, importance=importance, name="importance")
        plain = quantize(weight)

        def weighted(q):
            return ((weight - dequantize(q.packed, q.scale)) ** 2 * importance).double().sum()

        assert weighted(made) < weighted(plain)
        codes, scale = block_fp8((40, 96))
        compare("cpu", "cpu", codes, scale, importance=importance, name="importance on FP8")


def test_importance_of_ones_changes_nothing():
    weight = float_blocks()["normal"]
    assert torch.equal(quantize(weight).scale, quantize(weight, importance=torch.ones(96)).scale)


def test_source_memory_that_is_not_aligned_or_contiguous_converts_alike():
    codes, scale = block_fp8((130, 160))
    memory = torch.zeros(codes.numel() + 3, dtype=torch.uint8)
    memory[3:] = codes.view(torch.uint8).flatten()
    unaligned = memory[3:].view(codes.dtype).reshape(codes.shape)
    assert unaligned.data_ptr() % 8
    compare("cpu", "cpu", unaligned, scale, name="unaligned")
    wide = torch.cat([codes.view(torch.uint8)] * 2, dim=1).view(codes.dtype)
    compare("cpu", "cpu", wide[:, 160:], scale, name="not contiguous")


def test_a_processor_mode_that_flushes_subnormals_changes_nothing_and_stays_on():
    codes = torch.full((1, 32), 1, dtype=torch.uint8)  # the least subnormal code
    codes[0, 0] = 16
    truth = quantize(codes.view(torch.float8_e4m3fn), torch.ones(1, 1), backend="reference")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        made = quantize(codes.view(torch.float8_e4m3fn), torch.ones(1, 1))
        assert float(torch.tensor(1e-40) * 2.0**60) == 0
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(made.scale, truth.scale) and torch.equal(made.packed, truth.packed) and made.error == truth.error


def test_parameters_that_want_gradients_are_accepted():
    weight = torch.nn.Parameter(torch.ones(1, 32))
    made = quantize(weight, importance=torch.nn.Parameter(torch.ones(32)))
    assert torch.equal(made.packed, quantize(weight, backend="reference").packed)


def test_zero_columns_decode_to_zero_columns():
    empty = torch.zeros(4, 0, dtype=torch.uint8)
    for backend in ("reference", "cpu"):
        assert dequantize(empty, empty, backend=backend).shape == (4, 0)


def test_zero_rows_and_zero_experts_are_accepted():
    for shape in ((0, 64), (0, 8, 32), (2, 0, 32)):
        made = quantize(torch.zeros(shape))
        assert made.packed.shape == (*shape[:-1], shape[-1] // 2) and float(made.signal.sum()) == 0


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_fresh_fp8_blocks_convert_alike(data):
    rows = data.draw(st.integers(1, 6))
    codes = data.draw(st.binary(min_size=rows * 64, max_size=rows * 64))
    codes = torch.frombuffer(bytearray(c if c & 127 != 127 else c - 1 for c in codes), dtype=torch.uint8).reshape(rows, 64)
    scale = data.draw(st.floats(2.0**-149, 2.0**119, width=32))
    rule = data.draw(st.sampled_from(RULES))
    compare("cpu", "cpu", codes.view(torch.float8_e4m3fn), torch.full((1, 1), scale), name=f"scale {scale}", rule=rule)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32), st.sampled_from(RULES))
@settings(max_examples=40, deadline=None)
def test_fresh_float_blocks_convert_alike(values, rule):
    compare("cpu", "cpu", torch.tensor([values]), name="fresh", rule=rule)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the processor that is pretended is an x86-64 one")
def test_a_processor_without_newer_instructions_gives_the_same_bytes_and_sums(tmp_path):
    codes, scale = every_code(0.7)
    here = quantize(codes, scale)
    code = ("from kernel_cases import every_code; from kernels.mxfp4 import quantize; made = quantize(*every_code(0.7))\n"
            "print(made.packed.sum().item(), made.scale.sum().item(), *(x.item().hex() for x in made[2:]))")
    old = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | old | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout.split() == [str(here.packed.sum().item()), str(here.scale.sum().item()), *(x.item().hex() for x in here[2:])]
