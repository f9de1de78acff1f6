"""MXFP4 on one CPU core with numba: block-FP8 through tables, everything else through float64 arithmetic.

Block-FP8. All codes of a tile share one scale, so a tile holds at most 256 distinct weights w[c] = float32(c) * scale, and
whatever a block needs is a lookup, in tables built per tile from the float32-ROUNDED w[c]:

    the order of code magnitudes is that of |w|, so amax = |w[largest code]| and e0 follows from it
    preference[e0][c]   both error differences D(e0+1) - D(e0) and D(e0-1) - D(e0), packed in one int64 (below)
    nibble[e][c]        the E2M1 code under exponent e, sign included
    count[e][c]         how many codes c were written under e, from which all statistics follow

Tables of an exponent are built when a block of the tile first needs it, mostly for three or four exponents. One int64 load
per weight settles both comparisons: each difference is truncated to a multiple of 2^-20 and held in 32 bits. That moves a
sum of 32 by less than 32 units, so a sum beyond them decides as the exact one would; the others (in practice exact ties) go
to `exact_change`, which sums the exact float64 terms. Terms are differences of two squared errors, at most 25 - 4 in magnitude
(|u| just below 8, saturating at 3 under e0 - 1), so a sum stays below 32 * 21 * 2^20 < 2^30.

Roads not taken: integer sums of (code value * q) decide for the unrounded product, not for w; float64 error tables summed
per block instead of counts, which lose to them; threads, because one process per shard keeps cores busier than threads
inside one.

BF16, F16 and F32 weights, `importance`, and tiles too small to pay for tables go through `float_rows`, row panels at a time;
the panel is the only temporary copy of the weights.

Statistics are summed in float64 in a fixed order: block-FP8 by panels of PANEL_ROWS rows, in it tile by tile, in it exponent
by exponent and code by code (count * value); floats row by row, in it block by block. They are not bound to agree with other
backends to the last bit; packed and scale are.
"""

import functools
import math
import warnings

import numba
import numpy as np
import torch

from kernels.fp8 import NonFiniteError, check_finite, decode_block_fp8

BLOCK = 32
RULE_NUMBER = {"mse": 0, "ocp_floor": 1, "even": 2, "rceil": 3}
MSE, FLOOR, EVEN, RCEIL = range(4)
PANEL_BYTES = 1 << 18  # float32 row panel: stays in the second-level cache
PANEL_ROWS = 128  # of block-FP8: half a megabyte at 4096 columns, fits the second-level cache
OPEN = 64  # added to a block's exponent while it may still move; above every index of a table
OCTAVES = 24  # e4m3 spans 18 octaves of e0, and e runs one past either end
UNIT = 2.0**20
ZERO_BLOCK = OCTAVES - 1  # row of the tables for blocks of zeros, which belong to no octave
DOUBT = 32  # 32 terms, each truncated by less than a unit
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def jit(function):
    """numba.njit, cached on disk where some cache directory is writable, else compiled anew in each process."""
    options = {"nogil": True, "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(**options)(function)


@jit
def magnitude_value(x):
    """The E2M1 value nearest to x >= 0, ties to the even code, saturating."""
    # steps between neighbouring values, each taken once its midpoint is passed (or reached, where the lower code is odd)
    halves = np.int32(x > 0.25) + np.int32(x >= 0.75) + np.int32(x > 1.25) + np.int32(x >= 1.75)
    halves += 2 * (np.int32(x > 2.5) + np.int32(x >= 3.5)) + 4 * np.int32(x > 5.0)
    return 0.5 * halves


@jit
def magnitude_code(x):
    """The code (0-7) of `magnitude_value`."""
    return (
        np.uint8(x > 0.25) + np.uint8(x >= 0.75) + np.uint8(x > 1.25) + np.uint8(x >= 1.75)
        + np.uint8(x > 2.5) + np.uint8(x >= 3.5) + np.uint8(x > 5.0)
    )  # fmt: skip


@jit
def power(e):
    """2^e in float64."""
    return math.ldexp(1.0, e)


@jit
def exponent_of(amax, rule):
    """Exponent of a block under a rule that looks at amax alone; e0 for mse. amax in float64, finite."""
    if amax == 0.0:
        return -127
    mantissa, f = math.frexp(amax)  # mantissa in [.5, 1)
    f -= 1
    e = f - 2
    if rule == EVEN and mantissa >= 0.875:
        e += 1
    elif rule == RCEIL and mantissa > 0.75:
        e += 1
    return max(e, -127)


@jit
def error_term(u, step):
    """q^2 step^2 - 2 u q step, exact, for u >= 0 and step = 2^(e - e0), that is 1, 2 or .5."""
    q = magnitude_value(u / step) * step
    return q * q - 2.0 * u * q


@jit
def exact_change(weight, codes, begin, e0):
    """The mse rule's decision for the block codes[begin : begin + 32], from exact float64 sums."""
    inverse = power(-e0)
    same = up = down = 0.0
    for j in range(BLOCK):
        u = abs(np.float64(weight[codes[begin + np.uint64(j)]])) * inverse
        same += error_term(u, 1.0)
        up += error_term(u, 2.0)
        down += error_term(u, 0.5)
    change = 0
    if up < same:
        change, same = 1, up
    if down < same and e0 > -127:
        change = -1
    return change


@jit
def fill_nibble(nibble, weight, e):
    """E2M1 nibble of all codes under exponent e."""
    inverse = power(-e)
    for m in range(128):
        code = magnitude_code(abs(np.float64(weight[m])) * inverse)
        nibble[m], nibble[m + 128] = code, code + 8


@jit
def fill_preference(preference, nibble, weight, k, e0):
    """Packed error differences of the codes that can occur under e0, which have |u| < 8; |u| <= 2^-3 rounds to 0 always.

    nibble: the tables of e0 - 1, e0 and e0 + 1, at rows k - 1, k and k + 1.
    """
    inverse = power(-e0)
    for m in range(128):
        u = abs(np.float64(weight[m])) * inverse
        packed = np.int64(0)
        if 0.125 < u < 8.0:
            below, same, above = 0.5 * VALUES[nibble[k - 1, m]], VALUES[nibble[k, m]], 2.0 * VALUES[nibble[k + 1, m]]
            error = same * (same - 2.0 * u)
            up = np.int64((above * (above - 2.0 * u) - error) * UNIT)
            down = np.int64((below * (below - 2.0 * u) - error) * UNIT)
            packed = (up << 32) + down
        preference[k, m] = preference[k, m + 128] = packed


@jit
def larger_bytes(a, b):
    """The larger of each pair of bytes below 128, eight at a time; vectorized code for this is not what LLVM makes."""
    high = np.uint64(0x8080808080808080)
    keep = ((a | high) - b) & high  # the high bit survives where a >= b; no byte borrows from the next
    keep -= keep >> np.uint64(7)  # 0x80 -> 0x7f
    return (a & keep) | (b & ~(keep | high))


@jit
def largest_magnitude(a, b, c, d):
    """Largest code & 127 among 32 codes, given as four uint64."""
    low = np.uint64(0x7F7F7F7F7F7F7F7F)
    a = larger_bytes(larger_bytes(a & low, b & low), larger_bytes(c & low, d & low))
    a = larger_bytes(a, a >> np.uint64(32))
    a = larger_bytes(a, a >> np.uint64(16))
    return np.uint8(larger_bytes(a, a >> np.uint64(8)) & np.uint64(127))


@jit
def add_statistics(statistics, count, nibble, weight, e):
    """Add sum w^2, (w - w_hat)^2 and w_hat^2 of the codes counted under exponent e, code by code."""
    step = power(e)
    for m in range(128):
        n = count[m] + count[m + 128]
        if n:
            w = np.float64(weight[m])
            decoded = VALUES[nibble[m]] * step
            statistics[0] += n * (w * w)
            statistics[1] += n * ((w - decoded) * (w - decoded))
            statistics[2] += n * (decoded * decoded)


@jit
def find_exponents(words, weight, lowest, rule, chosen):
    """Step 1: chosen[block] = exponent under `rule` (e0 for mse) less `lowest`. False if a weight is not finite.

    Under mse, OPEN is added where another exponent than e0 could be better. With u = amax 2^-e0, e0 + 1 cannot unless u > 6:
    up to there its values are some of e0's. And e0 - 1 cannot unless u < 4.47: beyond, its saturation at 3 costs the
    largest element at least 2 u - 7 > 31/16, and the other 31 gain at most 1/16 each (0.25 hit in place of 0 or 0.5).
    """
    for block in range(chosen.size):  # no lookup in this loop, so that it vectorizes over blocks
        i = np.uint64(4 * block)
        chosen[block] = largest_magnitude(words[i], words[i + np.uint64(1)], words[i + np.uint64(2)], words[i + np.uint64(3)])
    exponent = np.full(128, -1, np.int8)
    exponent[0] = ZERO_BLOCK
    for block in range(chosen.size):
        largest = np.uint64(chosen[block])
        if exponent[largest] < 0:
            if largest == 127 or not np.isfinite(weight[largest]):
                return False
            e = exponent_of(np.float64(weight[largest]), rule)
            u = np.float64(weight[largest]) * power(-e)
            open_ = rule == MSE and not 4.5 < u <= 6.0
            exponent[largest] = e - lowest + (OPEN if open_ else 0)
        chosen[block] = exponent[largest]
    return True


@jit
def move_exponents(strip, weight, lowest, preference, has_preference, nibble, has_nibble, chosen):
    """Step 2, mse only: chosen[block] moves to the best of e0, e0 + 1, e0 - 1."""
    for block in range(chosen.size):
        if chosen[block] < OPEN:
            continue
        chosen[block] -= OPEN
        k = np.uint64(chosen[block])
        if not has_preference[k]:
            for row in range(chosen[block] - 1, chosen[block] + 2):
                if not has_nibble[row]:
                    fill_nibble(nibble[row], weight, lowest + row)
                    has_nibble[row] = True
            fill_preference(preference, nibble, weight, chosen[block], lowest + chosen[block])
            has_preference[k] = True
        begin = np.uint64(BLOCK * block)
        total = np.int64(0)
        for j in range(BLOCK):
            total += preference[k, strip[begin + np.uint64(j)]]
        down = np.int64(np.int32(total & 0xFFFFFFFF))
        up = (total - down) >> 32
        if min(abs(up), abs(down)) <= DOUBT or abs(up - down) <= 2 * DOUBT or lowest + chosen[block] == -127:
            chosen[block] += exact_change(weight, strip, begin, lowest + chosen[block])
        else:
            chosen[block] += np.int8((up < 0) & (up < down)) - np.int8((down < 0) & (down < up))


@jit
def write_blocks(strip, weight, lowest, nibble, has_nibble, count, has_count, chosen, first, in_row, stride, packed, scales):
    """Step 3: nibbles and scale bytes of a strip whose first block is block `first` of the matrix; counts the codes.

    in_row blocks of the strip, then `stride` blocks on for the next row.
    """
    for row in range(chosen.size // in_row):
        for column in range(in_row):
            block = row * in_row + column
            k = np.uint64(chosen[block])
            if not has_count[k]:
                if not has_nibble[k]:
                    fill_nibble(nibble[k], weight, lowest + chosen[block])
                    has_nibble[k] = True
                count[k, :] = 0
                has_count[k] = True
            begin, target = np.uint64(BLOCK * block), np.uint64(first + row * stride + column)
            half = target << np.uint64(4)
            for j in range(BLOCK // 2):
                pair = begin + np.uint64(2 * j)
                a, b = strip[pair], strip[pair + np.uint64(1)]
                packed[half + np.uint64(j)] = nibble[k, a] | np.uint8(nibble[k, b] << 4)
                count[k, a] += np.uint32(1)
                count[k, b] += np.uint32(1)
            scales[target] = 0 if k == ZERO_BLOCK else lowest + chosen[block] + 127


@jit
def fp8_tile(strip, words, chosen, weight, rule, first, in_row, stride, packed, scales, statistics):
    """Convert one tile, or rows of it, that lies contiguous in strip (uint8; words: the same memory as uint64).

    weight float32 [256] by code. First block `first` of the matrix, in_row blocks per row of the tile, stride per row of
    the matrix. chosen: int8 scratch, one per block. False if a weight is not finite.

    The blocks go through three steps, each a short loop over blocks that do not wait for each other; deciding and writing
    block by block is half as fast. In the steps indices are unsigned, because numba tests signed ones for being negative,
    and per block no array is sliced or passed to a function, because that costs two atomic reference counts.
    """
    lowest = exponent_of(np.float64(weight[1]), FLOOR) - 1
    preference = np.empty((OCTAVES, 256), np.int64)
    nibble = np.empty((OCTAVES, 256), np.uint8)
    count = np.empty((OCTAVES, 256), np.uint32)
    has_preference = np.zeros(OCTAVES, np.bool_)
    has_nibble = np.zeros(OCTAVES, np.bool_)
    has_count = np.zeros(OCTAVES, np.bool_)
    if not find_exponents(words, weight, lowest, rule, chosen):
        return False
    if rule == MSE:
        move_exponents(strip, weight, lowest, preference, has_preference, nibble, has_nibble, chosen)
    write_blocks(strip, weight, lowest, nibble, has_nibble, count, has_count, chosen, first, in_row, stride, packed, scales)
    for k in range(OCTAVES):
        if has_count[k] and k != ZERO_BLOCK:
            add_statistics(statistics, count[k], nibble[k], weight, lowest + k)
    return True


@jit
def gather_tiles(source, panel, first, rows, columns, tile_columns):
    """Copy rows of the matrix so that each tile's part becomes contiguous; both as uint64.

    Reads memory in its order, which the processor prefetches; rows of one tile lie a matrix row apart, where it does not.
    """
    for row in range(rows):
        begin = np.uint64(((first + row) * columns) >> 3)
        for left in range(0, columns, tile_columns):
            width = min(tile_columns, columns - left)
            target = np.uint64((left * rows + row * width) >> 3)
            for j in range(width >> 3):
                panel[target + np.uint64(j)] = source[begin + np.uint64(j)]
            begin += np.uint64(width >> 3)


@jit
def fp8_matrix(
    source, panel, panel_words, chosen, rows, columns, tile_scale, tile_rows, tile_columns, base, rule, packed, scales, statistics
):
    """Convert one matrix by panels of rows, tile by tile; the last tiles may be ragged. False if a weight is not finite.

    source: the matrix as uint64, flat; packed and scales: uint8, flat. base: float32 [256], the values of the codes.
    """
    weight = np.empty(256, np.float32)
    height = panel.size // columns
    for top in range(0, rows, tile_rows):
        for first in range(top, min(top + tile_rows, rows), height):
            part = min(height, top + tile_rows - first, rows - first)
            gather_tiles(source, panel_words, first, part, columns, tile_columns)
            for left in range(0, columns, tile_columns):
                width = min(tile_columns, columns - left)
                begin, size = left * part, width * part
                scale = tile_scale[top // tile_rows, left // tile_columns]
                for c in range(256):
                    weight[c] = base[c] * scale
                if not fp8_tile(
                    panel[begin : begin + size], panel_words[begin >> 3 : (begin + size) >> 3], chosen[: size // BLOCK], weight, rule,
                    (first * columns + left) // BLOCK, width // BLOCK, columns // BLOCK, packed, scales, statistics,
                ):  # fmt: skip
                    return False
    return True


@jit
def halving_sum(terms):
    """Sum of 32 numbers as ((a0 + a16) + (a8 + a24)) ...: vectorizes, and its order does not depend on the machine."""
    width = 16
    while width:
        for j in range(width):
            terms[j] += terms[j + width]
        width >>= 1
    return terms[0]


@jit
def float_rows(weight, bits, importance, weighted, rule, packed, scales, statistics):
    """Convert float32 rows [rows, in]; `bits` is the same memory as uint32. False if a weight is not finite."""
    rows, columns = weight.shape
    same = np.empty(BLOCK, np.float64)
    up = np.empty(BLOCK, np.float64)
    down = np.empty(BLOCK, np.float64)
    code = np.empty(BLOCK, np.uint8)
    for row in range(rows):
        signal = noise = decoded = 0.0
        for column in range(0, columns, BLOCK):
            largest = np.uint32(0)
            for j in range(BLOCK):
                largest = max(largest, np.uint32(bits[row, column + j] & np.uint32(0x7FFFFFFF)))
            if largest >= 0x7F800000:
                return False
            # the bits of a float32 >= 0 are ordered as its value; below 2^23 it is a subnormal, bits * 2^-149
            if largest < 0x800000:
                amax = math.ldexp(np.float64(largest), -149)
            else:
                amax = math.ldexp(np.float64((largest & 0x7FFFFF) | 0x800000), np.int64(largest >> 23) - 150)
            e = exponent_of(amax, rule)
            if rule == MSE:
                inverse = power(-e)
                for j in range(BLOCK):
                    x = abs(np.float64(weight[row, column + j])) * inverse
                    q = magnitude_value(x)
                    same[j] = q * q - 2.0 * x * q
                    q = 2.0 * magnitude_value(0.5 * x)
                    up[j] = q * q - 2.0 * x * q
                    q = 0.5 * magnitude_value(2.0 * x)
                    down[j] = q * q - 2.0 * x * q
                if weighted:
                    least = above = below = 0.0
                    for j in range(BLOCK):
                        factor = np.float64(importance[column + j])
                        least += factor * same[j]
                        above += factor * up[j]
                        below += factor * down[j]
                else:
                    least, above, below = halving_sum(same), halving_sum(up), halving_sum(down)
                change = 0
                if above < least:
                    change, least = 1, above
                if below < least and e > -127:
                    change = -1
                e += change
            step, inverse = power(e), power(-e)
            for j in range(BLOCK):
                w = np.float64(weight[row, column + j])
                x = abs(w) * inverse
                q = magnitude_value(x) * step
                code[j] = magnitude_code(x) | np.uint8((bits[row, column + j] >> 28) & 8)
                same[j] = w * w
                up[j] = (abs(w) - q) * (abs(w) - q)
                down[j] = q * q
            for j in range(BLOCK // 2):
                packed[row, column // 2 + j] = code[2 * j] | np.uint8(code[2 * j + 1] << 4)
            scales[row, column // BLOCK] = e + 127
            signal += halving_sum(same)
            noise += halving_sum(up)
            decoded += halving_sum(down)
        statistics[0] += signal
        statistics[1] += noise
        statistics[2] += decoded
    return True


@functools.cache
def code_values() -> np.ndarray:
    """float32 value of each of the 256 e4m3fn codes."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def refuse(weight, tile_scale, tile, expert):
    """Find and report the first weight of `expert` that is not finite; kernels only say that there is one."""
    try:
        if tile_scale is None:
            check_finite(weight[expert])
        else:
            decode_block_fp8(weight[expert], tile_scale[expert], tile)
    except NonFiniteError as error:
        raise NonFiniteError(error.what, (expert, *error.index), error.value) from None
    raise AssertionError(f"kernel refused matrix {expert} of {tuple(weight.shape)}, but all its weights are finite")


def quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, signal, error, decoded; arguments checked by kernels.mxfp4.quantize."""
    experts, out, columns = weight.shape
    assert columns % BLOCK == 0, f"in = {columns}"
    assert weight.device.type == "cpu", f"weight is on {weight.device}"
    weight = weight.contiguous()
    packed = torch.empty(experts, out, columns // 2, dtype=torch.uint8)
    scale = torch.empty(experts, out, columns // BLOCK, dtype=torch.uint8)
    statistics = torch.zeros(experts, 3, dtype=torch.float64)
    number = RULE_NUMBER[rule]
    by_table = tile_scale is not None and importance is None and weight.numel() > 0 and tile[1] % BLOCK == 0 and tile[0] * tile[1] >= 4096
    words = np.empty(min(tile[0], PANEL_ROWS, out) * columns // 8 if by_table else 0, np.uint64)
    scratch = (words.view(np.uint8), words, np.empty(len(words) // 4, np.int8))
    for i in range(experts):
        target = (packed[i].numpy(), scale[i].numpy(), statistics[i].numpy())
        if by_table:
            source = weight[i].view(torch.uint8).numpy().reshape(-1).view(np.uint64)
            flat = (target[0].reshape(-1), target[1].reshape(-1), target[2])
            fine = fp8_matrix(source, *scratch, out, columns, tile_scale[i].numpy(), *tile, code_values(), number, *flat)
        else:
            fine = by_panels(weight[i], None if tile_scale is None else tile_scale[i], number, tile, importance, target)
        if not fine:
            refuse(weight, tile_scale, tile, i)
    return packed, scale, *statistics.unbind(-1)


def by_panels(weight, tile_scale, number, tile, importance, target):
    """Convert [out, in] through float32 row panels; False if a weight is not finite."""
    out, columns = weight.shape
    packed, scale, statistics = target
    weighted = importance is not None
    factors = (importance if weighted else torch.ones(1)).contiguous().numpy()
    height = max(1, PANEL_BYTES // max(1, 4 * columns))
    for r in range(0, out, height):
        rows = weight[r : r + height].to(torch.float32)
        if tile_scale is not None:
            index = torch.arange(r, r + len(rows)) // tile[0]
            rows *= tile_scale[index].repeat_interleave(tile[1], dim=-1)[:, :columns]
        values = rows.numpy()
        span = slice(r, r + len(rows))
        if not float_rows(values, values.view(np.uint32), factors, weighted, number, packed[span], scale[span], statistics):
            return False
    return True


@jit
def decode_rows(packed, scale, bits, value_bits):
    """packed uint8 [rows, in/2] -> float32 bits [rows, in].

    value * 2^(s - 127) is value's float32 bits with s - 127 added to the exponent field, except for zero and where the sum
    leaves the field (s below 3 or above 252): there float64 arithmetic, rounded once, gives subnormals and infinity.
    """
    rows, half = packed.shape
    table = np.empty(16, np.uint32)
    for row in range(rows):
        for block in range(half // 16):
            s = scale[row, block]
            if 3 <= s <= 252:
                shift = np.uint32((np.int64(s) - 127) << 23)
                for code in range(16):
                    table[code] = value_bits[code, 127] if code & 7 == 0 else np.uint32(value_bits[code, 127] + shift)
            else:
                for code in range(16):
                    table[code] = value_bits[code, s]
            for j in range(16):
                byte = packed[row, 16 * block + j]
                bits[row, 32 * block + 2 * j] = table[byte & 15]
                bits[row, 32 * block + 2 * j + 1] = table[byte >> 4]


@functools.cache
def value_table() -> np.ndarray:
    """uint32 [16, 256]: float32 bits of nibble under scale byte."""
    signed = np.concatenate((VALUES, -VALUES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow to infinity is what float32 holds there
        return (signed[:, None] * 2.0 ** (np.arange(256) - 127.0)).astype(np.float32).view(np.uint32)


def dequantize(packed, scale, dtype):
    """Row panels through float32 bits; for other dtypes each panel is rounded by torch."""
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    packed = packed.contiguous().reshape(-1, packed.shape[-1])
    scale = scale.contiguous().reshape(-1, scale.shape[-1])
    result = torch.empty(len(packed), shape[-1], dtype=dtype)
    height = max(1, PANEL_BYTES // max(1, 4 * shape[-1]))
    panel = torch.empty(min(height, len(packed)), shape[-1], dtype=torch.float32)
    for r in range(0, len(packed), height):
        rows = result[r : r + height] if dtype == torch.float32 else panel[: min(height, len(packed) - r)]
        decode_rows(packed[r : r + height].numpy(), scale[r : r + height].numpy(), rows.numpy().view(np.uint32), value_table())
        if dtype != torch.float32:
            result[r : r + height] = rows
    return result.reshape(shape)
