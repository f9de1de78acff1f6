"""Stored numbers as numpy arrays, without torch: its import takes longer than converting a gigabyte.

numpy has no BF16 and no FP8. Here uint16 holds BF16 bits and uint8 holds FP8 or E8M0 bytes; float16 and float32 are themselves.
"""

import functools

import numpy as np

from kernels.errors import NonFiniteError


@functools.cache
def e4m3_values() -> np.ndarray:
    """float32 [256]: the value of each e4m3fn code; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[code & 127 == 127] = np.nan
    return np.copysign(values, np.where(code < 128, 1.0, -1.0)).astype(np.float32)


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Row-major index of the first true element; `mask` must have one."""
    return tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape))


def to_float32(array: np.ndarray) -> np.ndarray:
    """float32, exactly, from float32, float16 or BF16 bits (uint16)."""
    if array.dtype != np.uint16:
        return array.astype(np.float32, copy=False)
    wide = array.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def e8m0_to_float32(scale: np.ndarray) -> np.ndarray:
    """uint8 -> float32 2^(byte - 127), exactly: byte 0 is the subnormal 2^-127. Raises NonFiniteError at the first byte 255."""
    bad = scale == 255
    if bad.any():
        raise NonFiniteError("block scale", first_index(bad), float("nan"))
    bits = scale.astype(np.uint32)
    bits <<= 23
    bits[scale == 0] = 1 << 22
    return bits.view(np.float32)


def check_matrix(weight: np.ndarray, tile_scale: np.ndarray | None, tile: tuple[int, int], block: int) -> None:
    """What every kernel asks of a matrix to convert: whole blocks, and FP8 codes exactly where there are scales, one for each tile.

    Raises AssertionError; NonFiniteError as `check_tile_scale`.
    """
    out, columns = weight.shape
    assert columns % block == 0, f"in = {columns}"
    assert (weight.dtype == np.uint8) == (tile_scale is not None), f"{weight.dtype} with tile scale {tile_scale is not None}"
    if tile_scale is not None:
        assert tile_scale.shape == (-(-out // tile[0]), -(-columns // tile[1])), f"{tile_scale.shape} for {weight.shape} in tiles {tile}"
        check_tile_scale(tile_scale)


def check_tile_scale(tile_scale: np.ndarray) -> None:
    """Raise NonFiniteError at the first scale that is not positive and finite."""
    bad = ~(np.isfinite(tile_scale) & (tile_scale > 0))
    if bad.any():
        index = first_index(bad)
        raise NonFiniteError("tile scale", index, float(tile_scale[index]))
