"""MXFP4 GEMM in float64 torch: exact weights, float64 products and sums, result not rounded."""

import torch

from kernels.mxfp4 import dequantize


def grouped_linear(x, packed, scale, expert_offsets):
    """x [T, in] sorted by expert -> float64 [T, out]."""
    result = torch.empty(len(x), packed.shape[1], dtype=torch.float64)
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        weight = dequantize(packed[expert], scale[expert], backend="reference").to(torch.float64)
        result[begin:end] = x[begin:end].to(torch.float64) @ weight.T
    return result
