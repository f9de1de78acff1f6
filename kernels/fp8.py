"""Block-FP8: e4m3fn codes under one float32 scale per tile, decoded exactly.

    w = float32(code) * float32(tile_scale)          the product rounded once, to float32

This is the definition of the source weights for everything in mxforge: the conversion, its proof, its statistics. Rounding
through BF16, as most loaders do, changes 1.3 % of the MXFP4 bytes of a real checkpoint.

Tiles are `tile[0]` rows by `tile[1]` columns; the last tile in each direction may be ragged. A scale must be positive and
finite: zero or a negative scale is refused too, because no quantizer writes one and a silently zeroed tile is worse than
a stop.
"""

import math

import torch

from kernels.errors import NonFiniteError


def first_index(mask: torch.Tensor) -> tuple[int, ...]:
    """Row-major index of the first true element; `mask` must have one."""
    flat = int(mask.reshape(-1).to(torch.uint8).argmax())
    index = []
    for size in reversed(mask.shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))


def check_finite(weight: torch.Tensor, what: str = "weight") -> None:
    """Raise NonFiniteError at the first NaN or infinity."""
    bad = ~torch.isfinite(weight)
    if bad.any():
        index = first_index(bad)
        raise NonFiniteError(what, index, float(weight[index]))


def check_tile_scale(tile_scale: torch.Tensor, shape: tuple[int, ...], tile: tuple[int, int]) -> torch.Tensor:
    """Check the scales of a weight of `shape` and return them as contiguous float32 (BF16 and F16 convert exactly)."""
    if tile_scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"tile scale dtype {tile_scale.dtype}: expected float32, bfloat16 or float16")
    wanted = (*shape[:-2], math.ceil(shape[-2] / tile[0]), math.ceil(shape[-1] / tile[1]))
    if tuple(tile_scale.shape) != wanted:
        raise ValueError(f"tile scale shape {tuple(tile_scale.shape)}: weight {tuple(shape)} in tiles {tuple(tile)} needs {wanted}")
    tile_scale = tile_scale.detach().to(torch.float32).contiguous()
    bad = ~(torch.isfinite(tile_scale) & (tile_scale > 0))
    if bad.any():
        index = first_index(bad)
        raise NonFiniteError("tile scale", index, float(tile_scale[index]))
    return tile_scale


def decode_block_fp8(codes: torch.Tensor, tile_scale: torch.Tensor, tile: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """Decode block-FP8 weights exactly.

    Args:
        codes: float8_e4m3fn [..., out, in]. tile_scale: float32, bfloat16 or float16 [..., ceil(out/tile[0]), ceil(in/tile[1])].
    Returns:
        float32 [..., out, in].
    Raises:
        NonFiniteError: a NaN code, an overflow, or a scale that is not positive and finite. ValueError: wrong dtype or shape.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes dtype {codes.dtype}: expected torch.float8_e4m3fn")
    tile_scale = check_tile_scale(tile_scale, tuple(codes.shape), tile)
    weight = codes.to(torch.float32)
    rows, columns = codes.shape[-2:]
    for r in range(0, rows, tile[0]):  # tile rows keep the expanded scales small
        scale = tile_scale[..., r // tile[0], :].repeat_interleave(tile[1], dim=-1)[..., :columns]
        weight[..., r : r + tile[0], :] *= scale.unsqueeze(-2)
    check_finite(weight)
    return weight
