"""Multiplying by converted weights is as accurate as the activations' dtype allows."""

import pytest
import torch
from kernel_cases import check_gemm, check_gemm_decodes_exactly

from kernels import gemm, mxfp4


def test_cpu_gemm_is_accurate_for_empty_experts_single_rows_and_odd_row_counts():
    check_gemm("cpu", "cpu")
    check_gemm("cpu", "cpu", out=5, columns=32, tokens=(3,))


def test_cpu_gemm_decodes_every_byte_exactly():
    check_gemm_decodes_exactly("cpu", "cpu")


def test_no_tokens_give_no_rows():
    made = mxfp4.quantize(torch.randn(2, 8, 32))
    empty = torch.zeros(0, 32, dtype=torch.bfloat16)
    assert gemm.grouped_linear(empty, made.packed, made.scale, torch.zeros(3, dtype=torch.int32)).shape == (0, 8)
    assert gemm.linear(empty, made.packed[0], made.scale[0]).shape == (0, 8)


@pytest.mark.parametrize("offsets", [[0, 1], [0, 1, 3], [1, 1, 2], [0, 3, 2]])
def test_offsets_that_do_not_cover_the_rows_are_refused(offsets):
    made = mxfp4.quantize(torch.randn(2, 8, 32))
    with pytest.raises(ValueError, match="expert_offsets"):
        gemm.grouped_linear(torch.zeros(2, 32), made.packed, made.scale, torch.tensor(offsets))


def test_shapes_that_do_not_match_are_refused_with_their_numbers():
    made = mxfp4.quantize(torch.randn(8, 64))
    with pytest.raises(ValueError, match=r"\(2, 32\)"):
        gemm.linear(torch.zeros(2, 32), made.packed, made.scale)
