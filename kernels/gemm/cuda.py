"""MXFP4 GEMM in Triton, weight-only (W4A16): nibbles are decoded in registers, products summed in float32.

    y[t, n] = sum_k x[t, k] * value(nibble[g, n, k]) * 2^(scale[g, n, k/32] - 127)

A program owns BT rows of one expert by BN outputs and walks k in steps of BK, at least one block of 32. The weight tile is
decoded to x's dtype: exact in BF16; in F16 exact for scale bytes 104..140, which covers real checkpoints, and rounded beyond.
Decoding, not memory, is what a step takes most of (6 to 7 instructions per weight, all told), so BF16 is decoded in pairs.

Grouping: expert g takes ceil(rows_g / BT) row tiles. `row_tiles_kernel` finds the expert and first row of each row tile from
their running sum, on the device and in one launch. The grid is an upper bound, because the host never waits to learn the groups: with m
experts that have rows, sum of ceil(rows_g / BT) <= m + (T - m) / BT, which grows with m <= min(E, T). Row tiles past the last expert's
return at once. `linear` is the case E = 1 and needs no groups.

Tile sizes: for few tokens narrow tiles in three or four stages, so that many loads are on their way at once, whose k is split over the warps
of a program (SPLIT): each decodes and sums a part of every step, and the parts are added in a fixed order at the end; above, tiles that Hopper
multiplies with wgmma, in three or four stages where shared memory holds them. A matrix for DENSE_ROWS rows and more is decoded once
and multiplied by cuBLAS: a row tile of 128 would decode it again and again. The tiles that Step-3.7's shapes take spill no registers on
sm_90 (tests/kernels/test_triton_compile.py): with a limit of 255 named the assembler keeps what it otherwise spills to make room for more
programs than shared memory holds. Float32 activations, which no tensor core multiplies exactly, take small tiles.

Roads not taken: split-k over programs, which would fill a large GPU better at T = 1 but needs atomics (results would vary from run to run)
or a second pass; tl.dot_scaled, which wants activations in a microscaling format on most hardware; autotuning, because the
first call would then take longer than the checks this kernel is for.
"""

import os

import torch
import triton
import triton.language as tl

from kernels.mxfp4.cuda import TWO_TO_126, block_unit, decode_nibble, decode_pair, dequantize, on_its_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its tl.dot multiplies the bit patterns of BF16, not the values
FEW_PROGRAMS = 512  # below this many, narrower ones: four on each multiprocessor of a large GPU
MULTIPROCESSORS = 132  # of such a GPU
DENSE_ROWS = 512


@triton.jit
def weight_tile(packed, scale, n, k_block, blocks, EVEN: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
                WIDEN: tl.constexpr, SPLIT: tl.constexpr):
    """Tile function: weights [32 * BB, BN] of outputs n in DTYPE, rows starting at block k_block; [SPLIT, 32 * BB / SPLIT, BN] where SPLIT > 1.

    EVEN: all are inside, and `scale` points to int32, four bytes each, because single bytes cannot be loaded ahead of their use
    (cp.async starts at four). Otherwise `scale` points to bytes, and weights outside are zero.
    """
    block = k_block + tl.arange(0, BB)
    at = n[:, None] * blocks + block[None, :]  # [BN, BB]: a scale byte and 16 packed bytes
    k_byte = k_block * 16 + tl.arange(0, 16 * BB)
    byte = n[:, None] * (blocks * 16) + k_byte[None, :]  # two axes: older compilers order three badly
    if EVEN:
        word = tl.load(scale + n[:, None] * (blocks // 4) + (k_block // 4 + tl.arange(0, BB // 4))[None, :])
        unit = tl.reshape((word[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255, [BN, BB])
        pair = tl.load(packed + byte)
    else:
        inside = (block < blocks)[None, :] & (n[:, None] >= 0)
        unit = tl.load(scale + at, mask=inside, other=127)
        pair = tl.load(packed + byte, mask=(k_byte < blocks * 16)[None, :] & (n[:, None] >= 0), other=0)
    pair = pair.to(tl.int32)
    unit = block_unit(unit)[:, :, None]
    if DTYPE == tl.bfloat16:
        both = decode_pair(pair)
        if WIDEN:
            low, high = (both << 16).to(tl.float32, bitcast=True), (both & -0x10000).to(tl.float32, bitcast=True)
        else:
            low, high = both.to(tl.int16).to(tl.bfloat16, bitcast=True), (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            unit = unit.to(tl.bfloat16)
        w = tl.reshape((tl.interleave(low, high) * TWO_TO_126).to(low.dtype), [BN, BB, 32]) * unit
    else:
        w = tl.reshape(tl.interleave(decode_nibble(pair), decode_nibble(pair >> 4)), [BN, BB, 32]) * unit
    if SPLIT > 1:
        return tl.permute(tl.reshape(w.to(DTYPE), [BN, SPLIT, 32 * BB // SPLIT]), (1, 2, 0))
    else:
        return tl.trans(tl.reshape(w.to(DTYPE), [BN, 32 * BB]))


@triton.jit(do_not_specialize=["tiles"])
def row_tiles_kernel(offsets, tile_expert, tile_row, experts, tiles, BT: tl.constexpr, EP: tl.constexpr, N: tl.constexpr):
    """Pointer kernel: expert and first row of x of each row tile; `experts` for those past the last. Grid (ceil(tiles / N),)."""
    e = tl.arange(0, EP)
    rows = tl.load(offsets + e + 1, mask=e < experts, other=0) - tl.load(offsets + e, mask=e < experts, other=0)
    count = (rows.to(tl.int32) + BT - 1) // BT
    end = tl.cumsum(count, axis=0)
    tile = tl.program_id(0) * N + tl.arange(0, N)
    before = (end[None, :] <= tile[:, None]) & (e < experts)[None, :]
    expert = tl.sum(before.to(tl.int32), axis=1)
    start = tl.sum(tl.where(before, count[None, :], 0), axis=1)
    inside = tile < tiles
    tl.store(tile_expert + tile, expert, mask=inside)
    tl.store(tile_row + tile, tl.load(offsets + expert, mask=inside, other=0) + (tile - start) * BT, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def grouped_kernel(
    x, packed, scale, y, offsets, tile_expert, tile_row, tokens, out, experts, columns: tl.constexpr, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (ceil(out / BN), row tiles). `columns` is compiled in: the interpreters of Triton 3.4 to 3.6 cannot loop to
    a number that is not, and a model has few widths."""
    tl.static_assert(BK % (128 if EVEN else 32) == 0, "BK must hold whole blocks, and words of four scale bytes if EVEN")
    blocks = columns // 32
    if GROUPED:
        expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
        if expert >= experts:
            return
        t = tl.load(tile_row + tl.program_id(1)).to(tl.int64) + tl.arange(0, BT)
        end = tl.load(offsets + expert + 1).to(tl.int64)
        scale += expert * out * (blocks // 4 if EVEN else blocks)
        packed += expert * out * blocks * 16
    else:
        t = (tl.program_id(1) * BT).to(tl.int64) + tl.arange(0, BT)
        end = tokens.to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t_inside, n_inside = t < end, n < out
    weight_row = tl.minimum(n, out - 1)  # outside, an output that exists is computed again and not stored
    if SPLIT > 1:  # each warp sums its part of every step's k; added in a fixed order at the end
        sums = tl.zeros([SPLIT, BT, BN], tl.float32)
    else:
        sums = tl.zeros([BT, BN], tl.float32)
    for k in range(0, columns, BK):
        column = k + tl.arange(0, BK)
        inside = t_inside[:, None] & (column >= 0)[None, :]  # rows of another expert are not fetched
        if not EVEN:
            inside &= (column < columns)[None, :]
        rows = tl.load(x + t[:, None] * columns + column[None, :], mask=inside, other=0.0)
        w = weight_tile(packed, scale, weight_row, k // 32, blocks, EVEN, BK // 32, BN, x.dtype.element_ty, WIDEN, SPLIT)
        if WIDEN:
            rows, w = rows.to(tl.float32), w.to(tl.float32)
        if SPLIT > 1:
            rows = tl.permute(tl.reshape(rows, [BT, SPLIT, BK // SPLIT]), (1, 0, 2))
        sums = tl.dot(rows, w, sums, input_precision="ieee")
    if SPLIT > 1:
        sums = tl.sum(sums, axis=0)
    tl.store(y + t[:, None] * out + n[None, :], sums.to(y.dtype.element_ty), mask=t_inside[:, None] & n_inside[None, :])


def row_tiles(experts: int, tokens: int, bt: int) -> int:
    """At most so many row tiles have rows, however they are spread over the experts; see the module docstring."""
    nonempty = min(experts, tokens)
    return nonempty + (tokens - nonempty) // bt


def tile_sizes(dtype: torch.dtype, out: int, columns: int, experts: int, tokens: int) -> tuple[int, int, int, int, int]:
    """(BT, BN, BK, warps, stages); see the module docstring."""
    if dtype == torch.float32:  # no tensor cores: products of whole tiles would not fit the registers
        return 16, 32, 32, 4, 2
    mean = tokens / experts
    if mean <= 16:
        few = triton.cdiv(out, 64) * row_tiles(experts, tokens, 16) < FEW_PROGRAMS
        if not few:
            return 16, 64, 128, 4, 4
        narrow = 16 if triton.cdiv(out, 16) * row_tiles(experts, tokens, 16) >= MULTIPROCESSORS else 8
        return (16, narrow, 512, 8, 3) if columns % 512 == 0 else (16, narrow, 256, 4, 4)
    # more than 99 KB of shared memory in a program: data-centre GPUs from Hopper on
    large = INTERPRETED or triton.runtime.driver.active.get_current_target().arch in (90, 100, 103)
    if mean <= 128:
        few = triton.cdiv(out, 64) * row_tiles(experts, tokens, 64) < MULTIPROCESSORS
        if few and mean <= 32 and columns % 512 == 0:
            return 32, 16, 512, 8, 3 if large else 2
        return 64, 32 if few else 64, 128, 4, 4 if large else 2
    return 128, 128, 128, 8, 3 if large else 2


def summed_in_float32(x, weight):
    """x @ weight^T by cuBLAS, which by torch's default may add its partial sums in BF16."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        return x @ weight.T
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed


@on_its_device
def grouped_linear(x, packed, scale, expert_offsets):
    """x [T, in] sorted by expert -> x's dtype [T, out]; arguments checked by kernels.gemm."""
    experts, out, half = packed.shape
    tokens, columns = x.shape
    assert columns == 2 * half and columns % 32 == 0, f"x = {tuple(x.shape)}, packed = {tuple(packed.shape)}"
    assert out * half < 2**31, f"matrix of {out} x {columns} weights: indices in it are int32"
    result = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if not (tokens and out and experts):
        return result
    if experts == 1 and tokens >= DENSE_ROWS and x.dtype == torch.bfloat16:
        return summed_in_float32(x, dequantize(packed[0], scale[0], x.dtype))
    bt, bn, bk, warps, stages = tile_sizes(x.dtype, out, columns, experts, tokens)
    grouped, tiles = experts > 1, row_tiles(experts, tokens, bt)
    assert tiles < 2**16, f"{tokens} rows in {experts} experts: {tiles} row tiles, the grid's second axis ends at 65535"
    scale = scale.contiguous()
    even = bk % 128 == 0 and columns % bk == 0 and scale.data_ptr() % 4 == 0
    tile_expert = tile_row = offsets = expert_offsets.contiguous()
    if grouped:
        tile_expert, tile_row = torch.empty(2, tiles + tiles % 2, dtype=torch.int64, device=x.device)  # even: both aligned to 16 bytes
        row_tiles_kernel[(triton.cdiv(tiles, 16),)](
            offsets, tile_expert, tile_row, experts, tiles, BT=bt, EP=triton.next_power_of_2(experts), N=16, num_warps=4, enable_fp_fusion=False
        )
    grouped_kernel[(triton.cdiv(out, bn), tiles)](
        x.contiguous(), packed.contiguous(), scale.view(torch.int32 if even else torch.uint8), result,
        offsets, tile_expert, tile_row, tokens, out, experts, columns=columns, GROUPED=grouped, EVEN=even, BT=bt, BN=bn, BK=bk, WIDEN=INTERPRETED,
        SPLIT=warps if bn <= 16 else 1, num_warps=warps, num_stages=stages, maxnreg=255, enable_fp_fusion=False,
    )  # fmt: skip
    return result
