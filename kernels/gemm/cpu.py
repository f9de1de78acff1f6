"""MXFP4 GEMM on the CPU: decode a panel of weight rows, multiply by it, forget it.

    panel = dequant(w[g, rows])          at most PANEL_WEIGHTS weights, so that it is multiplied while in cache
    y[rows of x of g, rows] = x @ panel^T

BF16 holds every MXFP4 weight exactly, so BF16 inputs multiply BF16 panels (oneDNN sums them in float32). F16 does not
(scales below 2^-23 or above 2^13), so F16 inputs are widened to float32 and the result is rounded once. Experts without rows
are never decoded. A fused nibble kernel was not written: for one token decoding dominates either way, and here the GEMM
checks conversions instead of serving them.
"""

import torch

from kernels.mxfp4 import dequantize

PANEL_WEIGHTS = 1 << 19


def grouped_linear(x, packed, scale, expert_offsets):
    """x [T, in] sorted by expert -> x's dtype [T, out]."""
    experts, out, half = packed.shape
    assert x.shape[1] == 2 * half, f"in = {x.shape[1]}, packed = {tuple(packed.shape)}"
    result = torch.empty(len(x), out, dtype=x.dtype)
    wide = x if x.dtype == torch.bfloat16 else x.to(torch.float32)
    height = max(1, PANEL_WEIGHTS // max(1, 2 * half))
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        for r in range(0, out, height):
            panel = dequantize(packed[expert, r : r + height], scale[expert, r : r + height], wide.dtype)
            result[begin:end, r : r + height] = wide[begin:end] @ panel.T
    return result
