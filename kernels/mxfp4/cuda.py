"""MXFP4 on NVIDIA GPUs with Triton: one read of the weights, one write of the result.

A tile is NB blocks of 32 weights, [NB, 32], one block per row of the tile, so every decision of a block is a reduction over
the tile's second axis. FP8 is decoded by placing the code's seven bits over float32's last exponent bits, where subnormals
stay subnormals: one exact product with 2^120, one rounding in the product with the scale, as in kernels.fp8; the same in
Triton's interpreter and on GPUs without FP8 conversion. u = w * 2^-e0 is exact wherever a code can be other than zero.

Rule `mse` without `importance` decides by two integers per block. An element's least error is u^2 - T(u), where T is convex and
piecewise linear, T(u) = sum over neighbours p < q of E2M1 of 2 (q - p) max(0, u - (p + q) / 2). Take x = |w| 2^-b; with r its
distance from the nearest integer, going from exponent b to b + 1 costs the block

    sum of max(0, r - 1/4) over x < 2   less   4 sum of max(0, x - 7)         x <= 10

At b = e0, x < 8; both sums are of multiples of 2^-25 and 2^-21, exact in int32 as read from float32's bits. Only one comparison
is needed: b + 1 can win only if amax > 7 * 2^b, and e0 - 1 only if amax < 4.46875 * 2^e0, where the second sum for b = e0 - 1
is smaller than 31/4, the most the first can be. So b = e0 - 1 for such blocks (x < 8.9375) and b = e0 for all others.

With `importance` errors are summed in float64, the columns added one by one; its launch forbids fused multiply-adds, which
would skip the rounding of a product. Elsewhere every product that one could absorb is exact, so it cannot change a byte.

Statistics: the 32 squares of a block are added in float32, in units of 4^e, blocks in float64: the decoded energy is exact, the
other two sums are right to 1e-6, which is 4e-6 dB; converting each weight to float64 would take as many cycles as all the rest.
A program reduces its blocks' to three sums, torch adds the programs'; no atomics, so that a run repeats to the last bit.

Roads not taken: tables per tile as in cpu_kernels.py (shared-memory lookups cost more here than the arithmetic); a hardware
cvt.e2m1x2, which only Blackwell has and which cannot choose the exponent.

With TRITON_INTERPRET=1, set before the first import of triton, the same kernels run on CPU tensors; for tests, slow.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.fp8 import NonFiniteError, check_finite, decode_block_fp8
from kernels.mxfp4.rules import RULE_NUMBER

BLOCK = 32
BLOCKS_PER_STEP, STEPS = 64, 8
BLOCKS_PER_PROGRAM = BLOCKS_PER_STEP * STEPS
BYTES_PER_PROGRAM = 2048
TWO_TO_120, TWO_TO_126, TWO_TO_MINUS_126 = tl.constexpr(2.0**120), tl.constexpr(2.0**126), tl.constexpr(2.0**-126)


@triton.jit
def power32(e):
    """2^e in float32 for int32 e in -126..127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power64(e):
    """2^e in float64 for int32 e in -1022..1023."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def round_to_e2m1(u):
    """Tile function: nearest E2M1 value (float32) of float32 u >= 0; ties to even; saturates.

    E2M1 steps by p / 2, p the power of two below u or 1: just the ulp that the float32 sum u + 2^22 p has.
    """
    clamped = tl.minimum(u, 6.0)
    p = tl.maximum(clamped.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    large = p * 4194304.0
    return (clamped + large) - large


@triton.jit
def decode_fp8(code, scale):
    """Tile function: float32 |w| of e4m3fn codes (int32); 480 * scale for the NaN codes."""
    return (((code & 127) << 20).to(tl.float32, bitcast=True) * TWO_TO_120) * scale


@triton.jit
def block_error(x, change: tl.constexpr, factor):
    """Tile function: weighted D(e0 + change) per block, [NB] float64; x = |u| float32 and factor float64 [NB, 32]."""
    step: tl.constexpr = 2.0**change
    inverse: tl.constexpr = 2.0 ** (-change)
    q = round_to_e2m1(x * inverse).to(tl.float64) * step
    term = factor * (q * (q - 2.0 * x.to(tl.float64)))  # q - 2x has at most 29 bits: one rounding, that of factor * term
    column = tl.arange(0, 32)[None, :]
    total = tl.zeros([x.shape[0]], tl.float64)
    for j in tl.static_range(32):
        total += tl.sum(tl.where(column == j, term, 0.0), axis=1)  # one term and 31 zeros: picks column j
    return total


@triton.jit
def least_weighted_error(magnitude, e, factor):
    """Tile function: the exponent of least weighted error beside e, int32 [NB]."""
    x = magnitude * power32(-e)[:, None]
    least = block_error(x, 0, factor)
    up = block_error(x, 1, factor)
    down = block_error(x, -1, factor)
    change = tl.where(up < least, 1, 0)
    least = tl.minimum(up, least)
    return e + tl.where((down < least) & (e > -127), -1, change)


@triton.jit
def least_error(magnitude, e, fraction):
    """Tile function: the exponent of least error beside e = e0, int32 [NB]; the two comparisons are in the module docstring."""
    low = (fraction < 0xF0000) & (e > -127)
    base = e - low.to(tl.int32)
    x = magnitude * power32(-base)[:, None]
    near = tl.minimum(x, 2.0)
    loss = tl.maximum(tl.abs(near - ((near + 8388608.0) - 8388608.0)), 0.25)  # adding 2^23 rounds to an integer
    gain = tl.maximum(x - 3.0, 4.0)
    lost = tl.sum(loss.to(tl.int32, bitcast=True) - 0x3E800000, axis=1)  # in 2^-25: the bits of .25 to .5 count their ulps
    gained = tl.sum(gain.to(tl.int32, bitcast=True) - 0x40800000, axis=1)  # in 2^-21: those of 4 to 8
    difference = lost.to(tl.int64) - 64 * gained.to(tl.int64)
    return base + ((difference < 0) | ((difference == 0) & low)).to(tl.int32)


@triton.jit
def choose_exponent(magnitude, amax, factor, RULE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Tile function: exponents int32 [NB] of |w| float32 [NB, 32], amax int32 [NB] the bits of each block's largest."""
    fraction = amax & 0x7FFFFF
    e = (amax >> 23) - 129  # f - 2; of a subnormal amax some number below -127, as it should be
    if RULE == 2:  # amax / 2^f >= 1.75
        e += (fraction >= 0x600000).to(tl.int32)
    if RULE == 3:  # amax > 6 * 2^(f - 2), that is amax / 2^f > 1.5
        e += (fraction > 0x400000).to(tl.int32)
    e = tl.maximum(e, -127)
    if RULE == 0:
        if WEIGHTED:
            e = least_weighted_error(magnitude, e, factor)
        else:
            e = least_error(magnitude, e, fraction)
    return e


@triton.jit
def quantize_kernel(
    weight, tile_scale, importance, packed, scale, sums, bad, out, columns, scale_rows, scale_columns,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FP8: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr,
    WEIGHTED: tl.constexpr, NB: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (programs per matrix, E); a program converts STEPS * NB consecutive blocks of matrix program_id(1)."""
    expert = tl.program_id(1).to(tl.int64)
    per_row = columns // 32
    blocks = out * per_row
    weight += expert * out * columns
    packed += expert * blocks * 16
    scale += expert * blocks
    signal = tl.zeros([NB], tl.float64)
    error = tl.zeros([NB], tl.float64)
    decoded = tl.zeros([NB], tl.float64)
    refused = tl.zeros([NB], tl.int32)
    j = tl.arange(0, 32)
    for step in range(STEPS):
        block = (tl.program_id(0) * STEPS + step) * NB + tl.arange(0, NB)
        inside = block < blocks
        mask = inside[:, None] & (j[None, :] >= 0)
        element = block[:, None] * 32 + j[None, :]
        limit = tl.full([NB], 0x7F800000, tl.int32)  # NaN or infinite from here on
        factor = 0.0
        if FP8:
            fp8 = tl.load(weight + element, mask=mask, other=0).to(tl.int32)
            row = block // per_row
            tile = (expert * scale_rows + row // TILE_ROWS) * scale_columns + (block - row * per_row) * 32 // TILE_COLUMNS
            s = tl.load(tile_scale + tile, mask=inside, other=1.0)
            magnitude = decode_fp8(fp8, s[:, None])
            limit = (480.0 * s).to(tl.int32, bitcast=True)  # also where it overflows
            sign = (fp8 >> 4) & 8
        else:
            if BF16:  # by its bits: the interpreter's own conversion loses subnormals
                bits = tl.load(weight + element, mask=mask, other=0).to(tl.int32) << 16
            else:
                bits = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
            magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
            sign = (bits >> 28) & 8
        if WEIGHTED:
            first = (block % per_row) * 32
            factor = tl.load(importance + first[:, None] + j[None, :], mask=mask, other=0.0).to(tl.float64)
        amax = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1)
        refused |= (amax >= limit).to(tl.int32)
        e = choose_exponent(magnitude, amax, factor, RULE, WEIGHTED)
        u = magnitude * power32(-e)[:, None]
        q = round_to_e2m1(u)

        noise = u - q  # exact
        unit = power64(2 * e)
        signal += tl.sum(u * u, axis=1).to(tl.float64) * unit
        error += tl.sum(noise * noise, axis=1).to(tl.float64) * unit
        decoded += tl.sum(q * q, axis=1).to(tl.float64) * unit  # exact: multiples of 1/4 up to 1152

        code = (q * TWO_TO_MINUS_126).to(tl.int32, bitcast=True) >> 22  # E2M1 is float32's least numbers without 22 bits
        low, high = tl.split(tl.reshape(code | sign, [NB, 16, 2]))
        half = tl.arange(0, 16)
        tl.store(packed + block[:, None] * 16 + half[None, :], (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
        tl.store(scale + block, (e + 127).to(tl.uint8), mask=inside)
    program = expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program * 3, tl.sum(signal, axis=0))
    tl.store(sums + program * 3 + 1, tl.sum(error, axis=0))
    tl.store(sums + program * 3 + 2, tl.sum(decoded, axis=0))
    tl.store(bad + program, tl.max(refused, axis=0))


@triton.jit
def block_unit(scale):
    """Tile function: 2^(scale byte - 127), float32; 2^-127 is subnormal."""
    s = scale.to(tl.int32)
    return tl.where(s > 0, s << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def decode_nibble(nibble):
    """Tile function: float32 value of the low four bits of int32.

    The three bits of the magnitude are float32's last exponent bits and first significand bit, 2^-126 of the value, zero and 1/2
    included; the arithmetic shift leaves copies of the sign between, which the mask removes.
    """
    return (((nibble << 28) >> 6) & -0x7E400000).to(tl.float32, bitcast=True) * TWO_TO_126


@triton.jit
def decode_pair(pair):
    """Tile function: both nibbles of a byte (int32) as two BF16 in one int32, 2^-126 of their values; the low nibble is the lower half.

    As in `decode_nibble`, at BF16's place: two products move the two nibbles to where they belong, and the masks drop the rest.
    """
    return ((pair * 0x00040040) & 0x01C001C0) | ((pair * 0x01001000) & -0x7FFF8000)


@triton.jit
def dequantize_kernel(packed, scale, result, bytes_in_all, BF16: tl.constexpr, N: tl.constexpr):
    """Pointer kernel: N packed bytes to 2N weights of result's dtype."""
    byte = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = byte < bytes_in_all
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    unit = block_unit(tl.load(scale + byte // 16, mask=inside, other=127))
    weight = tl.interleave(decode_nibble(pair) * unit, decode_nibble(pair >> 4) * unit)
    column = tl.program_id(0).to(tl.int64) * (2 * N) + tl.arange(0, 2 * N)
    weights_in_all = bytes_in_all.to(tl.int64) * 2  # 2^31 and more, where the bytes are an int32
    if BF16:  # result is int16: upper half of the float32, whose lower half is zero for every MXFP4 value
        bits = weight.to(tl.int32, bitcast=True) >> 16
        tl.store(result + column, bits.to(tl.int16), mask=column < weights_in_all)
    else:
        tl.store(result + column, weight.to(result.dtype.element_ty), mask=column < weights_in_all)


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


def on_its_device(function):
    """Decorates a host function: kernels run on the GPU of its first argument, on which all tensors must lie."""

    @functools.wraps(function)
    def wrapper(tensor, *arguments):
        places = {str(part.device) for part in (tensor, *arguments) if isinstance(part, torch.Tensor)}
        if len(places) > 1:
            raise ValueError(f"tensors are on {' and '.join(sorted(places))}: backend 'cuda' takes those of one GPU")
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    return wrapper


def launch_quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, float64 sums [E, programs, 3] and int32 [E, programs], not 0 where a weight is not finite; does not
    wait for the GPU."""
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
    sums = torch.empty(experts, programs, 3, dtype=torch.float64, device=device)  # every program writes its own
    bad = torch.zeros(experts, programs, dtype=torch.int32, device=device)
    if experts and programs:
        quantize_kernel[(programs, experts)](
            source.view(torch.uint8) if fp8 else source.view(torch.int16) if bf16 else source,
            source_scale.contiguous() if fp8 else sums,  # unused pointers still need a tensor
            importance.contiguous() if importance is not None else sums,
            packed, scale, sums, bad, out, columns, *(source_scale.shape[1:] if fp8 else (0, 0)),
            TILE_ROWS=tile[0], TILE_COLUMNS=tile[1], FP8=fp8, BF16=bf16, RULE=RULE_NUMBER[rule],
            WEIGHTED=importance is not None, NB=BLOCKS_PER_STEP, STEPS=STEPS, num_warps=4, enable_fp_fusion=importance is None,
        )  # fmt: skip
    return packed, scale, sums, bad


@on_its_device
def quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, signal, error, decoded; arguments checked by kernels.mxfp4.quantize."""
    packed, scale, sums, bad = launch_quantize(weight, tile_scale, rule, tile, importance)
    if bool(bad.any()):
        refuse(weight, tile_scale, tile)
    return packed, scale, *sums.sum(1).unbind(-1)


@on_its_device
def dequantize(packed, scale, dtype):
    """Any leading shape; one program per BYTES_PER_PROGRAM packed bytes."""
    packed, scale = packed.contiguous(), scale.contiguous()
    assert packed.numel() == 16 * scale.numel(), f"{packed.numel()} packed bytes, {scale.numel()} scales"
    result = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype, device=packed.device)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), BYTES_PER_PROGRAM),)
        bf16 = dtype == torch.bfloat16
        target = result.view(torch.int16) if bf16 else result
        dequantize_kernel[grid](packed, scale, target, packed.numel(), BF16=bf16, N=BYTES_PER_PROGRAM, num_warps=4, enable_fp_fusion=False)
    return result
