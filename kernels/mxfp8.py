"""MXFP8 on one CPU core with numba: the bytes of kernels.formats.encode_mxfp8, which says what they are.

Plain loops over the 32 weights of a block, without a decision that depends on one weight, so that LLVM makes vectors of them. With
x = |w| 2^-e, a float32's bits are rounded to E4M3's three bits of mantissa by an integer addition; below 2^-6, where E4M3 is
evenly spaced by 2^-9, adding 2^14 does the same.
"""

import numba
import numpy as np

from kernels.arrays import check_matrix, first_index
from kernels.compiled import exact_subnormals, jit
from kernels.errors import NonFiniteError
from kernels.panels import float_panel, panel_height

BLOCK = 32
LANES = 8  # sums per statistic, so that they are added as vectors and in the same order on every machine
OVERFLOW = 0x7F780000  # float32 bits from which on E4M3 rounds up to 2^128
POWER = (2.0 ** np.arange(-127, 128)).astype(np.float32)  # [e + 127]


@numba.njit(forceinline=True)
def bits_of(x):
    """float32's bits."""
    return np.float32(x).view(np.uint32)


@numba.njit(forceinline=True)
def float_of(bits):
    """The float32 of these bits."""
    return np.uint32(bits).view(np.float32)


@jit
def encode_rows(weight, bits, codes, scales, statistics):
    """float32 rows [rows, in], `bits` the same memory, to codes uint8 [rows, in] and scales uint8 [rows, in/32]; adds to the sums of
    w^2, (w - w_hat)^2 and w_hat^2. False if a weight is not finite or rounds to 2^128."""
    x, y = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    signal, error, square = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
    for row in range(len(weight)):
        for block in range(weight.shape[1] // BLOCK):
            first = block * BLOCK
            top = np.uint32(0)
            for j in range(BLOCK):
                top = max(top, bits[row, first + j] & np.uint32(0x7FFFFFFF))
            if top >= OVERFLOW:
                return False
            e = -127
            if top:  # the least e with amax <= 1.75 * 2^(8 + e)
                e = max(np.int64(top >> np.uint32(23)) - 135 + ((top & 0x7FFFFF) > 0x600000), -127)
            scales[row, block] = e + 127
            up, step2 = POWER[127 - e], np.float64(POWER[127 + e]) ** 2
            for j in range(BLOCK):
                word = bits_of(abs(weight[row, first + j]) * up)
                shifted = float_of(word) + np.float32(16384.0)
                rounded = (word + np.uint32(0x7FFFF) + ((word >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
                small = word < np.uint32(0x3C800000)  # 2^-6
                code = bits_of(shifted) & np.uint32(15) if small else rounded - np.uint32(960)
                x[j], y[j] = float_of(word), shifted - np.float32(16384.0) if small else float_of(rounded << np.uint32(20))
                codes[row, first + j] = np.uint8(code | ((bits[row, first + j] >> np.uint32(24)) & np.uint32(128)))
            for lane in range(LANES):
                a = b = c = 0.0
                for j in range(lane, BLOCK, LANES):
                    a += np.float64(x[j]) * np.float64(x[j])
                    b += np.float64(x[j] - y[j]) * np.float64(x[j] - y[j])
                    c += np.float64(y[j]) * np.float64(y[j])
                signal[lane] += step2 * a
                error[lane] += step2 * b
                square[lane] += step2 * c
    for lane in range(LANES):
        statistics[0] += signal[lane]
        statistics[1] += error[lane]
        statistics[2] += square[lane]
    return True


def encode_matrix(weight, tile_scale=None, tile=(128, 128)):
    """Convert one matrix that lies in numpy arrays, without torch.

    Args:
        weight: [out, in], `in` a multiple of 32: uint8 e4m3fn codes with `tile_scale`, or float32, float16 or uint16 (BF16 bits) without.
        tile_scale: float32 [ceil(out/tile[0]), ceil(in/tile[1])], positive.
    Returns:
        codes uint8 [out, in], scale uint8 [out, in/32], float64 [3]: sums of w^2, of (w - w_hat)^2 and of w_hat^2, right to 1e-11.
    Raises:
        NonFiniteError: names the first tile scale that is not positive and finite, or the first weight that is not finite or rounds to 2^128.
    """
    out, columns = weight.shape
    check_matrix(weight, tile_scale, tile, BLOCK)
    codes, scale, statistics = np.empty((out, columns), np.uint8), np.empty((out, columns // BLOCK), np.uint8), np.zeros(3)
    height = panel_height(columns)
    with exact_subnormals():
        for begin in range(0, out, height):
            values = float_panel(weight, tile_scale, tile, begin, min(begin + height, out))
            bits, end = values.view(np.uint32), begin + len(values)
            if not encode_rows(values, bits, codes[begin:end], scale[begin:end], statistics):
                row, column = first_index((bits & 0x7FFFFFFF) >= OVERFLOW)
                raise NonFiniteError("weight", (begin + row, column), float(values[row, column]))
    return codes, scale, statistics
