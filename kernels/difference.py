"""How far a release's matrix is from the source's: the sums behind an SQNR, in one look at each byte of both.

    source                                       release
    e4m3fn codes, a float32 scale per tile       mxfp4: two E2M1 nibbles a byte, E8M0 byte per 32
    bfloat16, float16 or float32                 mxfp8: e4m3fn codes, E8M0 byte per 32

A source of codes is decoded as everywhere (kernels/fp8.py): code times scale, rounded once to float32. The sums are float64, and apart for each
row: a few rows that are another's, or zeros where a page was lost, hardly show in those of a matrix. Like kernels/energy.py it shares nothing
with the kernels that quantize.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from kernels.arrays import check_tile_scale, e4m3_values, to_float32
from kernels.compiled import jit
from kernels.energy import E2M1, values_of_scales

BLOCK = 32


@functools.cache
def _values(scheme: str) -> np.ndarray:
    """float64: what a code of the release means at scale 1, of a nibble or of a byte."""
    return np.concatenate([E2M1, -E2M1]) if scheme == "mxfp4" else e4m3_values().astype(np.float64)


@numba.njit(forceinline=True, boundscheck=False)
def _block(weights, codes, position, unit, values, per_byte):
    """(sum of w^2, sum of (w - w_hat)^2) over one block; `weights` float32 [32], `position` of its first code."""
    signal = error = 0.0
    for j in range(BLOCK):
        byte = np.int64(codes[np.uint64(position + j // per_byte)])
        code = byte
        if per_byte == 2:
            code = byte >> 4 if j & 1 else byte & 15
        weight = np.float64(weights[j])
        apart = weight - values[code] * unit
        signal += weight * weight
        error += apart * apart
    return signal, error


@jit
def _of_codes(source, tile_scale, tile_rows, tile_columns, decode, codes, scale, values, units, per_byte):
    signal, error = np.zeros(source.shape[0]), np.zeros(source.shape[0])
    weights = np.empty(BLOCK, np.float32)
    for row in range(source.shape[0]):
        for block in range(source.shape[1] // BLOCK):
            for j in range(BLOCK):
                column = block * BLOCK + j
                weights[j] = decode[source[row, column]] * tile_scale[row // tile_rows, column // tile_columns]
            found = _block(weights, codes[row], block * (BLOCK // per_byte), units[scale[row, block]], values, per_byte)
            signal[row] += found[0]
            error[row] += found[1]
    return signal, error


@jit
def _of_floats(source, codes, scale, values, units, per_byte):
    signal, error = np.zeros(source.shape[0]), np.zeros(source.shape[0])
    for row in range(source.shape[0]):
        for block in range(source.shape[1] // BLOCK):
            weights = source[row, block * BLOCK:(block + 1) * BLOCK]
            found = _block(weights, codes[row], block * (BLOCK // per_byte), units[scale[row, block]], values, per_byte)
            signal[row] += found[0]
            error[row] += found[1]
    return signal, error


def difference(source: np.ndarray, tile_scale: np.ndarray | None, tile: tuple[int, int] | None, codes: np.ndarray, scale: np.ndarray,
               scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums of w^2, sums of (w - w_hat)^2), float64 [out], over each row of a matrix or of a part of one; relative error below 1e-10.

    Args:
        source: [out, in] as kernels/arrays.py holds it: uint8 codes with `tile_scale` float32 [ceil(out/tile[0]), ceil(in/tile[1])], or
            uint16 (bfloat16), float16 or float32 without.
        codes: uint8 [out, in/2] for mxfp4, [out, in] for mxfp8; scale: uint8 [out, in/32].
    Returns:
        NaN for a row where a number of either is NaN.
    Raises:
        ValueError: shapes that do not fit each other. NonFiniteError: a tile scale that is not positive and finite.
    """
    rows, columns = source.shape
    per_byte = 2 if scheme == "mxfp4" else 1
    if columns % BLOCK or codes.shape != (rows, columns // per_byte) or scale.shape != (rows, columns // BLOCK):
        raise ValueError(f"{scheme} codes {list(codes.shape)} and scales {list(scale.shape)} are not whole blocks of {BLOCK} of {list(source.shape)}")
    codes, scale = codes.view(np.uint8), scale.view(np.uint8)
    if tile_scale is not None:
        check_tile_scale(tile_scale)
        return _of_codes(source.view(np.uint8), tile_scale, *tile, e4m3_values().astype(np.float32), codes, scale, _values(scheme), values_of_scales(), per_byte)
    return _of_floats(to_float32(source), codes, scale, _values(scheme), values_of_scales(), per_byte)
