"""Numerics only: decoding block-FP8, converting to MXFP4 and back, multiplying by MXFP4 weights.

Imports torch, numpy, numba and triton, each only where it is needed; nothing of `stages`. Converting arrays on a CPU
(kernels.mxfp4.cpu.quantize_matrix) needs numpy and numba alone.
"""
