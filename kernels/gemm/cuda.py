"""MXFP4 GEMM in Triton, weight-only (W4A16): nibbles are decoded in registers, products summed in float32.

    y[t, n] = sum_k x[t, k] * value(nibble[g, n, k]) * 2^(scale[g, n, k/32] - 127)

A program owns BT rows of one expert by BN outputs and walks k in steps of BK, at least one block of 32. The weight tile is
decoded to x's dtype: exact in BF16; in F16 exact for scale bytes 104..140, which covers real checkpoints, and rounded beyond.

Grouping: expert g takes ceil(rows_g / BT) row tiles. Their running sum gives the expert of a row tile by a binary search
that torch does on the device, and the grid is the upper bound ceil(T / BT) + E: the host never waits to learn the groups.
Row tiles past the last expert's return at once. `linear` is the case E = 1.

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


@triton.jit
def weight_tile(packed, scale, n, k_block, n_inside, blocks, HALF: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr):
    """Tile function: weights [2 * HALF, BN] in DTYPE, rows starting at block k_block; zero outside."""
    byte = tl.arange(0, HALF)
    block = k_block + byte // 16
    inside = n_inside[:, None] & (block < blocks)[None, :]
    pair = tl.load(packed + n[:, None] * (blocks * 16) + (k_block * 16 + byte)[None, :], mask=inside, other=0).to(tl.int32)
    unit = block_unit(tl.load(scale + n[:, None] * blocks + block[None, :], mask=inside, other=127))
    w = tl.interleave(decode_nibble(pair & 15, unit), decode_nibble(pair >> 4, unit)).to(DTYPE)  # [BN, 2 * HALF]
    return tl.trans(w)


@triton.jit
def grouped_kernel(
    x, packed, scale, y, offsets, tile_expert, tile_start, out, columns, experts,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Pointer kernel. Grid (ceil(out / BN), row tiles)."""
    tl.static_assert(BK % 32 == 0, "BK must hold whole blocks of 32")
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    if expert >= experts:
        return
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    t = begin + (tl.program_id(1) - tl.load(tile_start + expert)) * BT + tl.arange(0, BT)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    t_inside, n_inside = t < end, n < out
    blocks = columns // 32
    packed += expert * out * blocks * 16
    scale += expert * out * blocks
    sums = tl.zeros([BT, BN], tl.float32)
    for k in range(0, columns, BK):
        column = k + tl.arange(0, BK)
        rows = tl.load(x + t[:, None] * columns + column[None, :], mask=t_inside[:, None] & (column < columns)[None, :], other=0.0)
        w = weight_tile(packed, scale, n, k // 32, n_inside, blocks, BK // 2, BN, x.dtype.element_ty)
        if WIDEN:
            rows, w = rows.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(rows, w, sums, input_precision="ieee")
    tl.store(y + t[:, None] * out + n[None, :], sums.to(y.dtype.element_ty), mask=t_inside[:, None] & n_inside[None, :])


def grouped_linear(x, packed, scale, expert_offsets):
    """x [T, in] sorted by expert -> x's dtype [T, out]; arguments checked by kernels.gemm."""
    experts, out, half = packed.shape
    tokens, columns = x.shape
    assert columns == 2 * half and columns % 32 == 0, f"x = {tuple(x.shape)}, packed = {tuple(packed.shape)}"
    result = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if not (tokens and out and experts):
        return result
    mean = tokens / experts
    bt = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 128 else 128
    bn, bk = (64, 128) if bt <= 32 else (128, 64)
    offsets = expert_offsets.to(device=x.device, dtype=torch.int64)
    tiles = torch.div(offsets.diff() + bt - 1, bt, rounding_mode="floor")
    ends = tiles.cumsum(0)
    bound = triton.cdiv(tokens, bt) + (experts if experts > 1 else 0)
    assert bound < 2**16, f"{tokens} rows in {experts} experts: {bound} row tiles, the grid's second axis ends at 65535"
    tile_expert = torch.searchsorted(ends, torch.arange(bound, device=x.device), right=True)
    grouped_kernel[(triton.cdiv(out, bn), bound)](
        x.contiguous(), packed.contiguous(), scale.contiguous(), result, offsets, tile_expert, ends - tiles, out, columns, experts,
        BT=bt, BN=bn, BK=bk, WIDEN=INTERPRETED, num_warps=4 if bt <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return result
