"""The Triton backend against the reference; run by test_triton.py in a process of its own, see there."""

import pytest
import torch
from kernel_cases import block_fp8, check_gemm, check_gemm_decodes_exactly, check_refusals, compare, every_code, float_blocks, generator

from kernels.mxfp4 import RULES, cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def tall_programs(request, monkeypatch):
    """Few programs where the kernel is interpreted, whose operations take as long on more rows; in one test they are as tall as on a GPU."""
    if not LARGE and request.node.name != "test_ragged_shapes_convert_alike[mse]":
        monkeypatch.setattr(cuda, "TALL", 4 * cuda.TALL)


@pytest.mark.parametrize("name", float_blocks())
def test_float_weights_convert_alike(name):
    for rule in RULES if LARGE else ("mse", "even"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = float_blocks()[name].to(dtype)
            if torch.isfinite(weight).all() and (LARGE or rule == "mse" or dtype == torch.float32):
                compare("cuda", DEVICE, weight, name=name, rule=rule)


@pytest.mark.parametrize("scale", [3e-4, 3.1e-38, 2.0**-149, 7.5e35])
def test_every_fp8_code_converts_alike(scale):
    compare("cuda", DEVICE, *every_code(scale), name=f"scale {scale}")


@pytest.mark.parametrize("rule", RULES)
def test_ragged_shapes_convert_alike(rule):
    for shape in ((3, 130, 160), (1, 32), *(((16, 1280, 4096), (5, 123, 4128)) if LARGE else ())):
        compare("cuda", DEVICE, *block_fp8(shape), name=str(shape), rule=rule)
    compare("cuda", DEVICE, block_fp8((40, 96))[0], torch.rand(6, 2, generator=generator(3)) + 0.1, rule=rule, tile=(7, 48))


def test_importance_picks_the_same_bytes():
    compare("cuda", DEVICE, float_blocks()["heavy_tailed"], importance=torch.rand(96, generator=generator(6)) ** 4)


def test_nan_infinity_and_bad_tile_scales_are_refused_at_their_index():
    check_refusals("cuda", DEVICE)


@pytest.mark.parametrize("shape", [(1280, 4096, (1, 33, 300)), (1280, 1312, (5, 300))] if LARGE else [(72, 160, (1, 7, 40)), (24, 256, (7, 200))])
def test_gemm_is_accurate(shape):
    """`in` with and without whole tiles: the kernel reads their scales in different ways."""
    check_gemm("cuda", DEVICE, *shape)


def test_gemm_decodes_every_byte_exactly():
    check_gemm_decodes_exactly("cuda", DEVICE)


def test_many_rows_of_one_matrix_are_multiplied_as_a_whole():
    check_gemm("cuda", DEVICE, 40, 64, (520,))
