"""MXFP4 on NVIDIA GPUs with Triton: one read of the weights, one write of the result.

A tile is NB blocks of 32 weights, [NB, 32], one block per row of the tile, so every decision of a block is a reduction over
the tile's second axis. Decoding:

    v = m                      if m < 8             m = code & 127; v counts units of 2^-9
        (8 + m % 8) << (m/8-1) otherwise
    w = (v * 2^-9) * scale     v has 4 significant bits: one rounding, as in kernels.fp8

done on integers, because it is the same in Triton's interpreter and on GPUs without FP8 conversion. Rounding to E2M1 runs in
float32: u = w * 2^-e0 is exact wherever a code can be other than zero. Errors are summed in float64, where they are exact
(kernels/mxfp4/__init__.py), so neither the reduction's order nor fused multiply-adds can change a byte; `importance` gives
that up, and there the columns are added one by one with contraction off.

Statistics: a program reduces its tile to three float64 sums, torch adds the programs' sums; no atomics, so that a run
repeats to the last bit. Roads not taken: tables per tile as in cpu.py (shared-memory lookups cost more here than seven
comparisons); a hardware cvt.e2m1x2, which only Blackwell has and which cannot choose the exponent.

With TRITON_INTERPRET=1, set before the first import of triton, the same kernels run on CPU tensors; for tests, slow.
"""

import torch
import triton
import triton.language as tl

from kernels.fp8 import NonFiniteError, check_finite, decode_block_fp8

BLOCK = 32
RULE_NUMBER = {"mse": 0, "ocp_floor": 1, "even": 2, "rceil": 3}
BLOCKS_PER_PROGRAM = 64
BYTES_PER_PROGRAM = 2048


@triton.jit
def power32(e):
    """2^e in float32 for int32 e in -126..127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power64(e):
    """2^e in float64 for int32 e in -1022..1023."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def round_to_code(x):
    """Tile function: nearest E2M1 magnitude code (0-7, int32) of float32 x >= 0; ties to even; saturates."""
    code = (x > 0.25).to(tl.int32) + (x >= 0.75).to(tl.int32) + (x > 1.25).to(tl.int32) + (x >= 1.75).to(tl.int32)
    return code + (x > 2.5).to(tl.int32) + (x >= 3.5).to(tl.int32) + (x > 5.0).to(tl.int32)


@triton.jit
def doubled_value(code):
    """Twice the E2M1 value of a magnitude code, int32: 0 1 2 3 4 6 8 12, the hexadecimal digits of one constant."""
    return ((0xC8643210 >> (code.to(tl.int64) * 4)) & 15).to(tl.int32)


@triton.jit
def decode_fp8(code, scale):
    """Tile function: float32 weight of e4m3fn codes (int32); infinity for the NaN codes, which the caller refuses."""
    m = code & 127
    shift = tl.maximum((m >> 3) - 1, 0)
    v = tl.where(m < 8, m, (8 + (m & 7)) << shift)
    magnitude = tl.where(m == 127, float("inf"), (v.to(tl.float32) * 0.001953125) * scale)
    return tl.where(code > 127, -magnitude, magnitude)


@triton.jit
def block_error(x, change: tl.constexpr, factor, WEIGHTED: tl.constexpr):
    """Tile function: D(e0 + change) per block, [NB] float64; x = |u| float32 [NB, 32], factor float64 [NB, 32]."""
    step: tl.constexpr = 2.0**change
    inverse: tl.constexpr = 2.0 ** (-change)
    q = doubled_value(round_to_code(x * inverse)).to(tl.float64) * (0.5 * step)
    term = q * (q - 2.0 * x.to(tl.float64))  # q - 2x has at most 29 bits: exact
    if WEIGHTED:
        term = factor * term
        column = tl.arange(0, 32)[None, :]
        total = tl.zeros([x.shape[0]], tl.float64)
        for j in tl.static_range(32):
            total += tl.sum(tl.where(column == j, term, 0.0), axis=1)  # one term and 31 zeros: picks column j
        return total
    else:
        return tl.sum(term, axis=1)


@triton.jit
def choose_exponent(magnitude, factor, RULE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Tile function: exponents int32 [NB] of |w| float32 [NB, 32]."""
    amax = tl.max(magnitude, axis=1).to(tl.float64)
    bits = amax.to(tl.int64, bitcast=True)  # every float32, subnormals too, is a normal float64
    f = (bits >> 52).to(tl.int32) - 1023
    fraction = bits & 0xFFFFFFFFFFFFF
    e = f - 2
    if RULE == 2:  # amax / 2^f >= 1.75
        e += (fraction >= 0xC000000000000).to(tl.int32)
    if RULE == 3:  # amax > 6 * 2^(f - 2), that is amax / 2^f > 1.5
        e += (fraction > 0x8000000000000).to(tl.int32)
    e = tl.maximum(e, -127)
    if RULE == 0:
        x = magnitude * power32(-e)[:, None]
        least = block_error(x, 0, factor, WEIGHTED)
        up = block_error(x, 1, factor, WEIGHTED)
        down = block_error(x, -1, factor, WEIGHTED)
        change = tl.where(up < least, 1, 0)
        least = tl.minimum(up, least)
        e += tl.where((down < least) & (e > -127), -1, change)
    return e


@triton.jit
def quantize_kernel(
    weight, tile_scale, importance, packed, scale, sums, bad,
    out, columns, tile_rows, tile_columns, scale_rows, scale_columns,
    FP8: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (programs per matrix, E); a program converts NB consecutive blocks of matrix program_id(1)."""
    expert = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    per_row = columns // 32
    inside = block < out * per_row
    row = block // per_row
    first = (block % per_row) * 32
    j = tl.arange(0, 32)
    mask = inside[:, None] & (j[None, :] >= 0)
    element = expert * out * columns + row.to(tl.int64)[:, None] * columns + first[:, None] + j[None, :]
    if FP8:
        code = tl.load(weight + element, mask=mask, other=0).to(tl.int32)
        s = tl.load(tile_scale + (expert * scale_rows + row // tile_rows) * scale_columns + first // tile_columns, mask=inside, other=1.0)
        w = decode_fp8(code, s[:, None])
    elif BF16:  # by its bits: the interpreter's own conversion loses subnormals
        w = (tl.load(weight + element, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        w = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32)
    bits = w.to(tl.int32, bitcast=True)
    negative = bits < 0
    refused = (bits & 0x7FFFFFFF) >= 0x7F800000  # NaN or infinite
    any_refused = tl.max(tl.max(refused.to(tl.int32), axis=1), axis=0)
    magnitude = tl.where(refused, 0.0, tl.abs(w))
    factor = magnitude.to(tl.float64)
    if WEIGHTED:
        factor = tl.load(importance + first[:, None] + j[None, :], mask=mask, other=0.0).to(tl.float64)
    e = choose_exponent(magnitude, factor, RULE, WEIGHTED)
    code = round_to_code(magnitude * power32(-e)[:, None])

    value = doubled_value(code).to(tl.float64) * power64(e - 1)[:, None]
    exact = magnitude.to(tl.float64)
    noise = exact - value
    program = (expert * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(sums + program, tl.sum(tl.sum(exact * exact, axis=1), axis=0))
    tl.store(sums + program + 1, tl.sum(tl.sum(noise * noise, axis=1), axis=0))
    tl.store(sums + program + 2, tl.sum(tl.sum(value * value, axis=1), axis=0))
    tl.store(bad + expert * tl.num_programs(0) + tl.program_id(0), any_refused)

    nibble = code | (negative.to(tl.int32) << 3)
    low, high = tl.split(tl.reshape(nibble, [NB, 16, 2]))
    target = expert * out * per_row + block
    half = tl.arange(0, 16)
    tl.store(packed + target[:, None] * 16 + half[None, :], (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scale + target, (e + 127).to(tl.uint8), mask=inside)


@triton.jit
def block_unit(scale):
    """Tile function: 2^(scale byte - 128), float32: the unit of `doubled_value`. 2^-128 and 2^-127 are subnormal."""
    s = scale.to(tl.int32)
    return tl.where(s > 1, (s - 1) << 23, 0x00200000 << s).to(tl.float32, bitcast=True)


@triton.jit
def decode_nibble(nibble, unit):
    """Tile function: float32 weight of int32 nibbles."""
    magnitude = doubled_value(nibble & 7).to(tl.float32) * unit
    return tl.where(nibble > 7, -magnitude, magnitude)


@triton.jit
def dequantize_kernel(packed, scale, result, bytes_in_all, BF16: tl.constexpr, N: tl.constexpr):
    """Pointer kernel: N packed bytes to 2N weights of result's dtype."""
    byte = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = byte < bytes_in_all
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    unit = block_unit(tl.load(scale + byte // 16, mask=inside, other=127))
    weight = tl.interleave(decode_nibble(pair & 15, unit), decode_nibble(pair >> 4, unit))
    column = tl.program_id(0).to(tl.int64) * (2 * N) + tl.arange(0, 2 * N)
    if BF16:  # result is int16: upper half of the float32, whose lower half is zero for every MXFP4 value
        bits = weight.to(tl.int32, bitcast=True) >> 16
        tl.store(result + column, bits.to(tl.int16), mask=column < 2 * bytes_in_all)
    else:
        tl.store(result + column, weight.to(result.dtype.element_ty), mask=column < 2 * bytes_in_all)


def refuse(weight, tile_scale, tile):
    """Find and report the first weight that is not finite, on the CPU, matrix by matrix."""
    for expert in range(len(weight)):
        try:
            if tile_scale is None:
                check_finite(weight[expert].cpu())
            else:
                decode_block_fp8(weight[expert].cpu(), tile_scale[expert].cpu(), tile)
        except NonFiniteError as error:
            raise NonFiniteError(error.what, (expert, *error.index), error.value) from None
    raise AssertionError(f"kernel refused {tuple(weight.shape)}, but all its weights are finite")


def quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, signal, error, decoded; arguments checked by kernels.mxfp4.quantize."""
    experts, out, columns = weight.shape
    assert columns % BLOCK == 0, f"in = {columns}"
    assert out * columns < 2**31 - BLOCK * BLOCKS_PER_PROGRAM, f"matrix of {out} x {columns} weights: indices in it are int32"
    assert experts < 2**16, f"{experts} matrices: the grid's second axis ends at 65535"
    device = weight.device
    weight = weight.contiguous()
    source, source_scale = weight, tile_scale
    if tile_scale is not None and tile[1] % BLOCK:  # a block would lie across tiles: no source of interest does this
        source, source_scale = decode_block_fp8(weight, tile_scale, tile), None
    fp8, bf16 = source_scale is not None, source.dtype == torch.bfloat16
    packed = torch.empty(experts, out, columns // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(experts, out, columns // BLOCK, dtype=torch.uint8, device=device)
    programs = triton.cdiv(out * columns // BLOCK, BLOCKS_PER_PROGRAM)
    sums = torch.zeros(experts, programs, 3, dtype=torch.float64, device=device)
    bad = torch.zeros(experts, programs, dtype=torch.int32, device=device)
    if experts and programs:
        quantize_kernel[(programs, experts)](
            source.view(torch.uint8) if fp8 else source.view(torch.int16) if bf16 else source,
            source_scale.contiguous() if fp8 else sums,  # unused pointers still need a tensor
            importance.contiguous() if importance is not None else sums,
            packed, scale, sums, bad, out, columns, tile[0], tile[1], *(source_scale.shape[1:] if fp8 else (0, 0)),
            FP8=fp8, BF16=bf16, RULE=RULE_NUMBER[rule], WEIGHTED=importance is not None, NB=BLOCKS_PER_PROGRAM,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if bool(bad.any()):
        refuse(weight, tile_scale, tile)
    return packed, scale, *sums.sum(1).unbind(-1)


def dequantize(packed, scale, dtype):
    """Any leading shape; one program per BYTES_PER_PROGRAM packed bytes."""
    packed, scale = packed.contiguous(), scale.contiguous()
    assert packed.numel() == 16 * scale.numel(), f"{packed.numel()} packed bytes, {scale.numel()} scales"
    result = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype, device=packed.device)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), BYTES_PER_PROGRAM),)
        bf16 = dtype == torch.bfloat16
        target = result.view(torch.int16) if bf16 else result
        dequantize_kernel[grid](packed, scale, target, packed.numel(), BF16=bf16, N=BYTES_PER_PROGRAM, num_warps=4)
    return result
