"""MXFP4 GEMM in Triton, weight-only (W4A16): nibbles are decoded in registers, products summed in float32.

    y[t, n] = sum_k x[t, k] * value(nibble[g, n, k]) * 2^(scale[g, n, k/32] - 127)

A program owns BT rows of one expert by BN outputs and walks k in steps of BK, at least one block of 32. The weight tile is
decoded to x's dtype: exact in BF16; in F16 exact for scale bytes 104..140, which covers real checkpoints, and rounded beyond.

Grouping: expert g takes ceil(rows_g / BT) row tiles. `row_tiles_kernel` finds the expert and first row of each row tile from
their running sum, on the device and in one launch, and the grid is the upper bound ceil(T / BT) + E: the host never waits to
learn the groups. Row tiles past the last expert's return at once. `linear` is the case E = 1 and needs no groups.

Tile sizes: for few tokens narrow tiles, two warps and four stages, so that many loads are on their way at once; from 64 rows
on, tiles that Hopper multiplies with wgmma. None spills registers on sm_90 (tests/kernels/test_triton_compile.py); the largest does
on sm_80, a few. Float32 activations, which no tensor core multiplies exactly, take small tiles.

Roads not taken: split-k, which would fill a large GPU better at T = 1 but needs atomics (results would vary from run to run)
or a second pass; tl.dot_scaled, which wants activations in a microscaling format on most hardware; autotuning, because the
first call would then take longer than the checks this kernel is for.
"""

import os

import torch
import triton
import triton.language as tl

from kernels.mxfp4.cuda import block_unit, decode_nibble

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its tl.dot multiplies the bit patterns of BF16, not the values
FEW_PROGRAMS = 512  # below this many, narrower ones: four on each multiprocessor of a large GPU


@triton.jit
def weight_tile(packed, scale, n, k_block, blocks, EVEN: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr):
    """Tile function: weights [32 * BB, BN] of outputs n in DTYPE, rows starting at block k_block.

    EVEN: all are inside, and `scale` points to int32, four bytes each, because single bytes cannot be loaded ahead of their use
    (cp.async starts at four). Otherwise `scale` points to bytes, and weights outside are zero.
    """
    block = k_block + tl.arange(0, BB)
    at = n[:, None] * blocks + block[None, :]  # [BN, BB]: a scale byte and 16 packed bytes
    byte = at[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    if EVEN:
        word = tl.load(scale + n[:, None] * (blocks // 4) + (k_block // 4 + tl.arange(0, BB // 4))[None, :])
        unit = tl.reshape((word[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255, [BN, BB])
        pair = tl.load(packed + byte)
    else:
        inside = (block < blocks)[None, :] & (n[:, None] >= 0)
        unit = tl.load(scale + at, mask=inside, other=127)
        pair = tl.load(packed + byte, mask=inside[:, :, None] & (byte >= 0), other=0)
    pair = pair.to(tl.int32)
    unit = block_unit(unit)[:, :, None]
    w = tl.interleave(decode_nibble(pair) * unit, decode_nibble(pair >> 4) * unit)
    return tl.trans(tl.reshape(w.to(DTYPE), [BN, 32 * BB]))


@triton.jit
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
    x, packed, scale, y, offsets, tile_expert, tile_row, tokens, out, columns, experts, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (ceil(out / BN), row tiles)."""
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
    row = tl.minimum(t, end - 1)  # outside, a row and an output that exist are computed again and not stored: no masks in the loop
    weight_row = tl.minimum(n, out - 1)
    sums = tl.zeros([BT, BN], tl.float32)
    for k in range(0, columns, BK):
        column = k + tl.arange(0, BK)
        if EVEN:
            rows = tl.load(x + row[:, None] * columns + column[None, :])
        else:
            rows = tl.load(x + row[:, None] * columns + column[None, :], mask=(column < columns)[None, :] & (row[:, None] >= 0), other=0.0)
        w = weight_tile(packed, scale, weight_row, k // 32, blocks, EVEN, BK // 32, BN, x.dtype.element_ty)
        if WIDEN:
            rows, w = rows.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(rows, w, sums, input_precision="ieee")
    tl.store(y + t[:, None] * out + n[None, :], sums.to(y.dtype.element_ty), mask=t_inside[:, None] & n_inside[None, :])


def grouped_linear(x, packed, scale, expert_offsets):
    """x [T, in] sorted by expert -> x's dtype [T, out]; arguments checked by kernels.gemm."""
    experts, out, half = packed.shape
    tokens, columns = x.shape
    assert columns == 2 * half and columns % 32 == 0, f"x = {tuple(x.shape)}, packed = {tuple(packed.shape)}"
    assert out * half < 2**31, f"matrix of {out} x {columns} weights: indices in it are int32"
    result = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if not (tokens and out and experts):
        return result
    mean, grouped = tokens / experts, experts > 1
    bt = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 128 else 128
    few = triton.cdiv(out, 64) * triton.cdiv(tokens, bt) < FEW_PROGRAMS
    bn, bk, warps, stages = 128, 128, 8, 2
    if x.dtype == torch.float32:  # no tensor cores: products of whole tiles would not fit the registers
        bt, bn, bk, warps, stages = 16, 32, 32, 4, 2
    elif bt <= 32:
        bn, bk, warps, stages = (16, 256, 2, 4) if few else (64, 128, 4, 4)
    tiles = triton.cdiv(tokens, bt) + (experts if grouped else 0)
    assert tiles < 2**16, f"{tokens} rows in {experts} experts: {tiles} row tiles, the grid's second axis ends at 65535"
    even = bk % 128 == 0 and columns % bk == 0 and scale.storage_offset() % 4 == 0
    tile_expert = tile_row = offsets = expert_offsets.to(x.device).contiguous()
    if grouped:
        tile_expert, tile_row = torch.empty(2, tiles, dtype=torch.int64, device=x.device)
        row_tiles_kernel[(triton.cdiv(tiles, 16),)](
            offsets, tile_expert, tile_row, experts, tiles, BT=bt, EP=triton.next_power_of_2(experts), N=16, num_warps=4, enable_fp_fusion=False
        )
    grouped_kernel[(triton.cdiv(out, bn), tiles)](
        x.contiguous(), packed.contiguous(), scale.contiguous().view(torch.int32 if even else torch.uint8), result,
        offsets, tile_expert, tile_row, tokens, out, columns, experts,
        GROUPED=grouped, EVEN=even, BT=bt, BN=bn, BK=bk, WIDEN=INTERPRETED,
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return result
