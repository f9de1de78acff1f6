"""MXFP4 on NVIDIA GPUs with Triton: one read of the weights, one write of the result.

A thread has whole blocks of 32 weights, so that every decision of a block stays in its registers. The weights of NB blocks are a tuple
of 16 tensors [NB, 2]: tensor 8 * half + i has column 16 * half + 8 * lane + i of each block, for the two lanes that it is wide. Of FP8 the
eight weights of a half and a lane are one 64-bit word, which shifts and masks take apart, and their codes one 32-bit word.

FP8 is decoded by placing the code's seven bits over float32's last exponent bits, where subnormals stay subnormals: one exact
product with 2^120, one rounding in the product with the scale, as in kernels.fp8; the same in Triton's interpreter and on GPUs
without FP8 conversion. All that is needed is x = |w| 2^-b for an exponent b of the block, so the scale is multiplied by 2^-b first. That
rounds alike unless w is subnormal: sources with scales below LEAST_SCALE are decoded before. x is exact wherever its code can be other
than zero.

Rule `mse` without `importance` decides by two sums per block. An element's least error is u^2 - T(u), where T is convex and
piecewise linear, T(u) = sum over neighbours p < q of E2M1 of 2 (q - p) max(0, u - (p + q) / 2). With r the distance of x from the
nearest integer, going from exponent b to b + 1 costs the block

    sum of max(0, r - 1/4) over x < 2   less   4 sum of max(0, x - 7)         x <= 10

The first is a sum of multiples of 2^-25, exact in int32 as read from float32's bits. In the second, (x - 7) / 2 is a multiple of 2^-22, of
which float32 adds up to 4 exactly; more than that outweighs the first sum however it was rounded. Only one comparison is needed:
b + 1 can win only if amax > 7 * 2^b, and e0 - 1 only if amax < 4.46875 * 2^e0, where the second sum for b = e0 - 1 is smaller
than 31/4, the most the first can be. So b = e0 - 1 for such blocks (x < 8.9375) and b = e0 for all others (x < 8).

With `importance` errors are summed in float64, the columns added one by one. The launch forbids the compiler to fuse multiplications and
additions, which would skip the rounding of a product there, and that of w in w - w_hat; where fusing changes nothing, it is written down.

Statistics: the 32 squares of a block are added in float32, in units of 4^b, blocks in float64: the decoded energy is exact, the
other two sums are right to 1e-6, which is 4e-6 dB; converting each weight to float64 would take as many cycles as all the rest.
A program reduces its blocks' to three sums, torch adds the programs'; no atomics, so that a run repeats to the last bit.

Instructions are what limits it, not memory: an H100 has time for about 20 per weight while it moves the bytes; the loop has 28
for rule mse and 20 for the others (tests/kernels/test_triton_compile.py counts them). Hence sums that round and products that saturate
where comparisons and shifts would do: a multiprocessor does twice as many of the former.

Roads not taken: tables per tile as in cpu_kernels.py (shared-memory lookups cost more here than the arithmetic); a hardware
cvt.e2m1x2, which only Blackwell has and which cannot choose the exponent; half precision to decode FP8 (as many instructions).

With TRITON_INTERPRET=1, set before the first import of triton, the same kernels run on CPU tensors; for tests, slow.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.errors import NonFiniteError
from kernels.fp8 import check_finite, decode_block_fp8
from kernels.mxfp4.rules import RULE_NUMBER

BLOCK = 32
TALL, WIDE, MOST_STEPS = 16, 8, 8  # a program takes TALL rows, WIDE blocks of each in a step
LEAST_SCALE = 2.0**-117  # of a tile: from here on all weights other than 0 are normal float32
BYTES_PER_PROGRAM = 2048
TWO_TO_100, TWO_TO_120, TWO_TO_126 = tl.constexpr(2.0**100), tl.constexpr(2.0**120), tl.constexpr(2.0**126)


@triton.jit
def bits_of(x):
    """int32 bits of float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """float32 of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power32(e):
    """2^e in float32 for int32 e in -126..127."""
    return float_of((e + 127) << 23)


@triton.jit
def power64(e):
    """2^e in float64 for int32 e in -1022..1023."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def saturate(x):
    """x between 0 and 1; costs nothing where x is a product or a sum."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def largest(parts):
    """Tile function: the largest of a block's 32 int32, [NB]."""
    top = parts[0]
    for i in tl.static_range(1, 16):
        top = tl.maximum(top, parts[i])
    return tl.max(top, axis=1)


@triton.jit
def load_fp8(weight, block, lane, mask):
    """Tile function: float32 bits of 2^-120 |code|, and the signs of 8 codes at bits 3, 7, ..., 31; weight points to int64."""
    bits, signs = (), ()
    for half in tl.static_range(2):
        word = tl.load(weight + block * 4 + 2 * half + lane, mask=mask, other=0)
        a, b = word.to(tl.int32), (word >> 32).to(tl.int32)
        for four in tl.static_range(2):
            part = b if four else a
            bits = bits + ((part << 20) & 0x07F00000, (part << 12) & 0x07F00000, (part << 4) & 0x07F00000, (part >> 4) & 0x07F00000)
        low, high = (a & 0xFFFF) | (b << 16), ((a >> 16) & 0xFFFF) | (b & -0x10000)  # codes 0 1 4 5 and 2 3 6 7
        packed = ((low >> 4) & 0x00080008) | ((low >> 8) & 0x00800080) | ((high << 4) & 0x08000800) | (high & -0x7FFF8000)
        signs = signs + (packed,)
    return bits, signs


@triton.jit
def load_floats(weight, block, lane, mask, INPUT: tl.constexpr):
    """Tile function: float32 bits of |w|, and signs as `load_fp8` has them; weight points to int64 (bf16, f16) or int32 (f32)."""
    bits, signs = (), ()
    for half in tl.static_range(2):
        packed = tl.zeros_like(mask.to(tl.int32))
        for i in tl.static_range(8):
            if INPUT == "f32":
                one = tl.load(weight + block * 32 + 16 * half + 8 * lane + i, mask=mask, other=0)
            else:
                four = tl.load(weight + block * 8 + 4 * half + 2 * lane + i // 4, mask=mask, other=0)
                one = (four >> (16 * (i % 4))).to(tl.int32)
                if INPUT == "bf16":  # by its bits: the interpreter's own conversion loses subnormals
                    one = one << 16
                else:
                    one = bits_of(one.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
            bits = bits + (one & 0x7FFFFFFF,)
            packed |= ((one >> 28) & 8) << (4 * i)
        signs = signs + (packed,)
    return bits, signs


@triton.jit
def round_to_e2m1(x, change):
    """Tile function: nearest E2M1 value times 2^change (float32) to x >= 0, ties to even, saturating, and int32 that has its code in bits
    0 to 3, zeros in bits 4 to 22.

    In units of 2^change E2M1 steps by p / 2, p the power of two below x, at least 1: just the ulp of the float32 sum x + 2^22 p. The sum's
    last bits count the steps from 0 to x, n, and code = n + 2 log2 p, where bits >> 22 is twice the sum's exponent, 298 + 2 log2 p + 2 change.
    With 3 - change in place of 0 behind 2^22 there are 6 - 2 change steps more, and all constants add up to 304.
    """
    clamped = tl.minimum(x, 6.0 * power32(change))
    p = float_of(tl.maximum(bits_of(clamped) & 0x7F800000, (127 + change) << 23))
    large = 4194307.0 - change.to(tl.float32)
    total = tl.fma(p, large, clamped)
    return tl.fma(p, -large, total), bits_of(total) + (bits_of(total) >> 22) - 304


@triton.jit
def eight_codes(codes):
    """Tile function: one int32 of eight nibbles from the int32 of `round_to_e2m1`."""
    high = codes[7]
    for i in tl.static_range(4):
        high = (high << 4) + codes[6 - i]
    low = (((codes[2] << 4) + codes[1]) << 4) + codes[0]
    return (high << 12) | (low & 0xFFF)  # bits from 23 on leave with the shift


@triton.jit
def block_error(x, change: tl.constexpr, factor, UNIT: tl.constexpr):
    """Tile function: weighted D(e0 + change) per block, [NB] float64; x = |u|."""
    first = tl.arange(0, 2)[None, :] == 0
    total = tl.zeros([x[0].shape[0]], tl.float64)
    for half in tl.static_range(2):
        for lane in tl.static_range(2):
            for i in tl.static_range(8 * half, 8 * half + 8):
                q, _ = round_to_e2m1(x[i], tl.full([1, 1], change + UNIT, tl.int32))
                difference = q.to(tl.float64) * (q.to(tl.float64) - 2.0 * x[i].to(tl.float64))  # exact
                term = factor[i].to(tl.float64) * difference
                total += tl.sum(tl.where(first == (lane == 0), term, 0.0), axis=1)  # one term and a zero
    return total


@triton.jit
def weighted_change(x, e, factor, UNIT: tl.constexpr):
    """Tile function: -1, 0 or 1, the step from e to the exponent of least weighted error, int32 [NB]; x = |w| 2^-e."""
    least, up, down = block_error(x, 0, factor, UNIT), block_error(x, 1, factor, UNIT), block_error(x, -1, factor, UNIT)
    change = tl.where(up < least, 1, 0)
    least = tl.minimum(up, least)
    return tl.where((down < least) & (e > -127), -1, change)


@triton.jit
def unweighted_change(x, low, HALF: tl.constexpr):
    """Tile function: 1 where exponent b + 1 is better than b, else 0, int32 [NB]; x = |w| 2^-b. Where `low`, b + 1 is e0, which wins a tie."""
    lost = tl.zeros_like(bits_of(x[0]))
    gained = tl.zeros_like(x[0])
    for i in tl.static_range(16):
        near = saturate(x[i] * HALF)
        distance = tl.abs(near - ((near + 4194304.0) - 4194304.0))  # r / 2: adding 2^22 rounds to a multiple of 1/2
        lost += bits_of(tl.maximum(distance, 0.125)) - 0x3E000000  # in 2^-25 of r: the bits of 1/8 to 1/4 count their ulps
        gained += saturate(tl.fma(x[i], HALF, -3.5))
    gain = (tl.minimum(tl.sum(gained, axis=1), 4.0) * 268435456.0).to(tl.int64)  # 8 of 2^25 each
    difference = tl.sum(lost, axis=1).to(tl.int64) - gain
    return ((difference < 0) | ((difference == 0) & low)).to(tl.int32)


@triton.jit
def quantize_kernel(
    weight, tile_scale, importance, packed, scale, sums, bad, out, columns, scale_rows, scale_columns,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INPUT: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (programs over rows, programs over columns, E); a program converts TALL rows by STEPS * WIDE blocks of a matrix."""
    expert = tl.program_id(2).to(tl.int64)
    per_row = columns // 32
    blocks = out * per_row
    weight += expert * blocks * (4 if INPUT == "fp8" else 32 if INPUT == "f32" else 8)
    packed += expert * blocks * 4
    scale += expert * blocks
    NB: tl.constexpr = TALL * WIDE
    UNIT: tl.constexpr = -20 if INPUT == "fp8" else 0  # x and q are in units of 2^-UNIT: one product decodes and scales FP8
    HALF: tl.constexpr = 524288.0 if INPUT == "fp8" else 0.5
    signal = tl.zeros([NB], tl.float64)
    error = tl.zeros([NB], tl.float64)
    decoded = tl.zeros([NB], tl.float64)
    refused = tl.zeros([NB], tl.int32)
    lane = tl.arange(0, 2)[None, :]
    row = tl.program_id(0) * TALL + tl.arange(0, NB) // WIDE
    for step in range(STEPS):
        position = (tl.program_id(1) * STEPS + step) * WIDE + tl.arange(0, NB) % WIDE
        inside = (row < out) & (position < per_row)
        block = row * per_row + position
        mask = inside[:, None] & (lane >= 0)
        if INPUT == "fp8":
            bits, signs = load_fp8(weight, block[:, None], lane, mask)
            tile = (expert * scale_rows + row // TILE_ROWS) * scale_columns + position * 32 // TILE_COLUMNS
            s = tl.load(tile_scale + tile, mask=inside, other=1.0)
            top = largest(bits)
            amax = bits_of((float_of(top) * TWO_TO_120) * s)
            refused |= (top == 0x07F00000).to(tl.int32)  # NaN
        else:
            bits, signs = load_floats(weight, block[:, None], lane, mask, INPUT)
            amax = largest(bits)
        refused |= (amax >= 0x7F800000).to(tl.int32)

        fraction = amax & 0x7FFFFF
        e = (amax >> 23) - 129  # f - 2; of a subnormal amax some number below -127, as it should be
        if RULE == 2:  # amax / 2^f >= 1.75
            e += (fraction >= 0x600000).to(tl.int32)
        if RULE == 3:  # amax > 6 * 2^(f - 2), that is amax / 2^f > 1.5
            e += (fraction > 0x400000).to(tl.int32)
        e = tl.maximum(e, -127)
        low = (fraction < 0xF0000) & (e > -127)
        if RULE == 0 and not WEIGHTED:
            e -= low.to(tl.int32)
        x = ()
        if INPUT == "fp8":
            unit = tl.where(top > 0, (s * power32(-e)) * TWO_TO_100, 0.0)[:, None]  # of zeros it could be infinite
            for i in tl.static_range(16):
                x = x + (float_of(bits[i]) * unit,)
        else:
            for i in tl.static_range(16):
                x = x + (float_of(bits[i]) * power32(-e)[:, None],)
        change = tl.zeros([NB], tl.int32)
        if RULE == 0:
            if WEIGHTED:
                factor = ()
                for i in tl.static_range(16):
                    column = position[:, None] * 32 + 16 * (i // 8) + 8 * lane + i % 8
                    factor = factor + (tl.load(importance + column, mask=mask, other=0.0),)
                change = weighted_change(x, e, factor, UNIT)
            else:
                change = unweighted_change(x, low, HALF)

        squares = tl.zeros_like(x[0])
        noises = tl.zeros_like(x[0])
        values = tl.zeros_like(x[0])
        words = ()
        for half in tl.static_range(2):
            codes = ()
            for i in tl.static_range(8 * half, 8 * half + 8):
                q, code = round_to_e2m1(x[i], change[:, None] + UNIT)
                noise = x[i] - q  # exact
                squares = tl.fma(x[i], x[i], squares)
                noises = tl.fma(noise, noise, noises)
                values = tl.fma(q, q, values)  # exact: multiples of 1/4 up to 1152, of 1 up to 4608
                codes = codes + (code,)
            words = words + (eight_codes(codes) | signs[half],)
        quarter = tl.arange(0, 4)[None, :]
        word = tl.reshape(tl.permute(tl.join(words[0], words[1]), (0, 2, 1)), (TALL * WIDE, 4))  # a thread's own: nothing moves
        tl.store(packed + block[:, None] * 4 + quarter, word, mask=inside[:, None] & (quarter >= 0))
        tl.store(scale + block, (e + change + 127).to(tl.uint8), mask=inside)
        square = power64(2 * (e - UNIT))
        signal += tl.sum(squares, axis=1).to(tl.float64) * square
        error += tl.sum(noises, axis=1).to(tl.float64) * square
        decoded += tl.sum(values, axis=1).to(tl.float64) * square
    program = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
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


INPUTS = {torch.float8_e4m3fn: ("fp8", torch.int64), torch.bfloat16: ("bf16", torch.int64), torch.float16: ("f16", torch.int64),
          torch.float32: ("f32", torch.int32)}  # fmt: skip  # what the kernel calls a dtype, and as what it reads it


def launch_quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, float64 sums [E, programs, 3] and int32 [E, programs], not 0 where a weight is not finite; does not
    wait for the GPU. Scales from LEAST_SCALE on, tiles of whole blocks."""
    experts, out, columns = weight.shape
    assert columns % BLOCK == 0, f"in = {columns}"
    assert (out + TALL) * (columns + MOST_STEPS * WIDE * BLOCK) < 2**31, f"matrix of {out} x {columns} weights: indices in it are int32"
    assert experts < 2**16, f"{experts} matrices: the grid's third axis ends at 65535"
    device, (kind, words) = weight.device, INPUTS[weight.dtype]
    weight = weight.contiguous()
    if weight.data_ptr() % 16:  # part of other memory
        weight = weight.clone()
    packed = torch.empty(experts, out, columns // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(experts, out, columns // BLOCK, dtype=torch.uint8, device=device)
    steps = triton.cdiv(columns // BLOCK, WIDE)
    grid = triton.cdiv(out, TALL), triton.cdiv(steps, MOST_STEPS), experts
    sums = torch.empty(experts, grid[0] * grid[1], 3, dtype=torch.float64, device=device)  # every program writes its own
    bad = torch.zeros(experts, grid[0] * grid[1], dtype=torch.int32, device=device)
    if bad.numel():
        quantize_kernel[grid](
            weight.view(words), tile_scale.contiguous() if kind == "fp8" else sums,  # unused pointers still need a tensor
            importance.contiguous() if importance is not None else sums,
            packed.view(torch.int32), scale, sums, bad, out, columns, *(tile_scale.shape[1:] if kind == "fp8" else (0, 0)),
            TILE_ROWS=tile[0], TILE_COLUMNS=tile[1], INPUT=kind, RULE=RULE_NUMBER[rule], WEIGHTED=importance is not None,
            TALL=TALL, WIDE=WIDE, STEPS=triton.cdiv(steps, max(grid[1], 1)), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, scale, sums, bad


@on_its_device
def quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, signal, error, decoded; arguments checked by kernels.mxfp4.quantize."""
    source, source_scale = weight, tile_scale
    if tile_scale is not None and (tile[1] % BLOCK or bool((tile_scale < LEAST_SCALE).any())):  # no source of interest is like that
        source, source_scale = decode_block_fp8(weight, tile_scale, tile), None
    packed, scale, sums, bad = launch_quantize(source, source_scale, rule, tile, importance)
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
