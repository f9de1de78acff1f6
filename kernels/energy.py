"""The sum of squares of what a release's bytes decode to, in one look at each byte: how a release is proven at the disk's speed.

    mxfp4    uint8 [..., in/2], two E2M1 nibbles    E8M0 byte per 32 weights, 16 bytes
    mxfp8    uint8 [..., in], e4m3fn codes          E8M0 byte per 32 weights, 32 bytes

A byte of codes means one square, or the sum of two, before its block's scale, so that a table of 256 takes the place of decoding.
It shares nothing with the kernels that quantize: what they measured is compared with what this finds on the disk.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from kernels.arrays import e4m3_values
from kernels.compiled import jit

CODE_BYTES = {"mxfp4": 16, "mxfp8": 32}
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@functools.cache
def squares_of_bytes(scheme: str) -> np.ndarray:
    """float64 [256]: the sum of squares that a byte of codes stands for, scale 1; NaN for the codes that are."""
    if scheme == "mxfp8":
        return e4m3_values().astype(np.float64) ** 2
    code = np.arange(256)
    return E2M1[code & 7] ** 2 + E2M1[code >> 4 & 7] ** 2


@functools.cache
def values_of_scales() -> np.ndarray:
    """float64 [256]: 2^(byte - 127); NaN for byte 255."""
    result = 2.0 ** (np.arange(256) - 127.0)
    result[255] = np.nan
    return result


@functools.cache
def squares_of_scales() -> np.ndarray:
    """float64 [256]: 4^(byte - 127), exactly; NaN for byte 255."""
    return values_of_scales() ** 2


@numba.njit(forceinline=True, boundscheck=False)
def sum_blocks(codes, scales, squares, units, size):
    """Sum over blocks of `size` bytes; exact but for the addition of blocks."""
    total = 0.0
    for block in range(len(scales)):
        square = 0.0
        for j in range(size):
            square += squares[codes[np.uint64(block * size + j)]]
        total += square * units[scales[block]]
    return total


@jit
def sum_of_squares(codes, scales, squares, units, size):
    """`sum_blocks`, compiled for either size."""
    if size == 16:
        return sum_blocks(codes, scales, squares, units, 16)
    return sum_blocks(codes, scales, squares, units, 32)


def energy(codes: np.ndarray, scale: np.ndarray, scheme: str) -> float:
    """Sum of w_hat^2 of whole blocks; relative error below 1e-10.

    Args:
        codes, scale: contiguous uint8, any shape, as the table above; scheme: mxfp4 or mxfp8.
    Returns:
        NaN where a code (mxfp8) or a scale means NaN.
    """
    size = CODE_BYTES[scheme]
    assert codes.size == size * scale.size, f"{codes.size} bytes of {scheme} codes, {scale.size} scales"
    return sum_of_squares(codes.reshape(-1), scale.reshape(-1), squares_of_bytes(scheme), squares_of_scales(), size)
