"""Numerics only: decoding block-FP8, converting to MXFP4 and back, multiplying by MXFP4 weights.

Imports torch, numpy, numba and triton, the last two only when a backend that needs them is used; nothing of `stages`.
"""
