"""Exact decoders of the formats that checkpoints store weights in, and the encoder of MXFP8. torch only, any device.

    format   codes                          scales                                         w
    fp8      float8_e4m3fn                  float per tile of any size (kernels.fp8)       code * scale
    mxfp8    float8_e4m3fn                  E8M0 byte per 32 inputs                        code * 2^(byte - 127)
    mxfp4    E2M1 nibbles, low = even       E8M0 byte per 32 inputs                        code * 2^(byte - 127)
    nvfp4    E2M1 nibbles, low = even       E4M3 per 16 inputs, float32 per tensor         code * (scale * tensor scale)
    int4     nibbles + 8 in int32, low first  float per group, zero points or none         (code - zero) * scale

Every decoder gives float32. Codes have at most 4 significant bits and scales at most 24, so where a product needs rounding
it is rounded once, to float32; nothing passes through BF16 on the way. An NVFP4 block's two scales are multiplied (divided,
where the tensor scale is stored as its reciprocal) and rounded to float32 first: that is how its writers define it.

Refused with NonFiniteError, which names the index: NaN codes, products that overflow float32, E8M0 byte 255 (NaN), and
scales that are NaN, infinite, negative or zero. The one zero that is accepted is an NVFP4 block scale: E4M3 underflows for
a block that is tiny beside the tensor's largest, and the format then means a block of zeros.
"""

import math
from typing import NamedTuple

import torch

from kernels.errors import NonFiniteError
from kernels.fp8 import check_finite, first_index

BLOCK = 32
NVFP4_BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E4M3_MAX = 448.0


class Encoded(NamedTuple):
    """`encode_mxfp8`'s result, in the field order of `kernels.mxfp4.Quantized`.

    codes float8_e4m3fn [..., out, in]; scale uint8 [..., out, in/32]; signal, error, decoded: float64 sums of squares of w,
    of w - w_hat and of w_hat over everything passed.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    signal: torch.Tensor
    error: torch.Tensor
    decoded: torch.Tensor


def e8m0_to_float(scale: torch.Tensor) -> torch.Tensor:
    """uint8 or float8_e8m0fnu bytes -> float32 2^(byte - 127), exactly: byte 0 is the subnormal 2^-127.

    Raises NonFiniteError at the first byte 255.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dtype != torch.uint8:
        raise ValueError(f"scale dtype {scale.dtype}: expected uint8 or float8_e8m0fnu")
    bad = scale == 255
    if bad.any():
        raise NonFiniteError("block scale", first_index(bad), float("nan"))
    bits = scale.to(torch.int32) << 23
    return torch.where(scale == 0, torch.full_like(bits, 1 << 22), bits).view(torch.float32)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 or int8 [..., n] -> E2M1 values float32 [..., 2 n]; the low nibble is the even column."""
    if packed.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"packed dtype {packed.dtype}: expected uint8 or int8")
    packed = packed.view(torch.uint8)
    table = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return table[pairs.int()].flatten(-2)


def _blocks(values: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """values [..., in] times scale [..., in / size], each over its block; the result takes the place of values."""
    if scale.shape != (*values.shape[:-1], values.shape[-1] // size) or values.shape[-1] % size:
        raise ValueError(f"scale shape {tuple(scale.shape)}: weights {tuple(values.shape)} in blocks of {size} need "
                         f"{(*values.shape[:-1], values.shape[-1] // size)}")
    values.unflatten(-1, (-1, size)).mul_(scale.unsqueeze(-1))
    return values


def decode_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """MXFP4 as compressed-tensors, Quark and DeepSeek-V4 (int8, float8_e8m0fnu) store it, and gpt-oss once flattened.

    Args:
        packed: uint8 or int8 [..., in/2]. scale: uint8 or float8_e8m0fnu [..., in/32].
    Returns:
        float32 [..., in].
    Raises:
        NonFiniteError: byte 255, or 6 * 2^127 and its like, which float32 cannot hold. ValueError: wrong dtype or shape.
    """
    weight = _blocks(unpack_nibbles(packed), e8m0_to_float(scale), BLOCK)
    check_finite(weight)
    return weight


def decode_mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [..., in] and E8M0 [..., in/32] -> float32 [..., in]; raises as `decode_mxfp4`, and for a NaN code."""
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes dtype {codes.dtype}: expected torch.float8_e4m3fn")
    weight = _blocks(codes.to(torch.float32), e8m0_to_float(scale), BLOCK)
    check_finite(weight)
    return weight


def decode_nvfp4(packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor, reciprocal: bool) -> torch.Tensor:
    """NVFP4 -> float32 [..., in].

    Args:
        packed: uint8 [..., in/2]. block_scale: float8_e4m3fn [..., in/16]. tensor_scale: float32, one element, > 0.
        reciprocal: False where the tensor scale multiplies (ModelOpt's weight_scale_2), True where it divides
            (compressed-tensors' weight_global_scale).
    Raises:
        NonFiniteError: "tensor scale" or "block scale" that is NaN, infinite or negative (zero: the tensor scale only).
    """
    if block_scale.dtype != torch.float8_e4m3fn or tensor_scale.numel() != 1:
        raise ValueError(f"block scale dtype {block_scale.dtype}, tensor scale {tuple(tensor_scale.shape)}: expected "
                         "float8_e4m3fn and one element")
    whole = tensor_scale.to(torch.float32).reshape(())
    if not bool(torch.isfinite(whole) & (whole > 0)):
        raise NonFiniteError("tensor scale", (0,), float(whole))
    scale = block_scale.to(torch.float32)
    bad = ~(scale >= 0)
    if bad.any():
        index = first_index(bad)
        raise NonFiniteError("block scale", index, float(scale[index]))
    scale = scale / whole if reciprocal else scale * whole
    weight = _blocks(unpack_nibbles(packed), scale, NVFP4_BLOCK)
    check_finite(weight)
    return weight


def unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 [..., ceil(columns / 8)] -> int8 [..., columns] in -8..7: eight nibbles a word, the low one first, 8 added."""
    if packed.dtype != torch.int32 or packed.shape[-1] != math.ceil(columns / 8):
        raise ValueError(f"packed {packed.dtype} {tuple(packed.shape)}: expected int32 [..., {math.ceil(columns / 8)}]")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return (nibbles.flatten(-2)[..., :columns] - 8).to(torch.int8)


def decode_int4(
    packed: torch.Tensor, scale: torch.Tensor, columns: int, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """compressed-tensors pack-quantized INT4 -> float32 [..., rows, columns].

    Args:
        packed: int32 [..., rows, ceil(columns / 8)]. scale: float [..., rows, groups], columns a multiple of groups.
        zero_point: int8 [..., rows, groups] in -8..7 (already unpacked), or None where the scheme is symmetric.
    Raises:
        NonFiniteError: "tile scale" that is not positive and finite, or a product that overflows.
    """
    scale = scale.to(torch.float32)
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        index = first_index(bad)
        raise NonFiniteError("tile scale", index, float(scale[index]))
    if columns % scale.shape[-1]:
        raise ValueError(f"scale shape {tuple(scale.shape)}: {columns} columns are not whole groups")
    group = columns // scale.shape[-1]
    codes = unpack_int4(packed, columns).to(torch.float32)
    if zero_point is not None:
        codes.unflatten(-1, (-1, group)).sub_(zero_point.to(torch.float32).unsqueeze(-1))
    weight = _blocks(codes, scale, group)
    check_finite(weight)
    return weight


def encode_mxfp8(weight: torch.Tensor) -> Encoded:
    """float32, bfloat16 or float16 [..., in] -> MXFP8.

    A block's exponent is the least e >= -127 with amax <= 448 * 2^e, so that nothing saturates (torchao's RCEIL; the OCP
    floor rule, floor(log2 amax) - 8, cuts off what lies above 448/512 of the next power). compressed-tensors' rule differs
    from it in one case only, amax = 448 * 2^e exactly, where it takes e + 1. Elements are rounded to the nearest E4M3 value,
    ties to even; the sign of zero is kept; an all-zero block has scale byte 0.

    Raises NonFiniteError for a NaN, an infinity, or a weight so large that it rounds to 2^128; ValueError
    for `in` that is no multiple of 32.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"weight shape {tuple(weight.shape)}: expected inputs in a multiple of {BLOCK}")
    weight = weight.to(torch.float32)
    check_finite(weight)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1))  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 9 + (mantissa > E4M3_MAX / 512)  # 448 = 0.875 * 2^9
    exponent = torch.where(mantissa == 0, torch.full_like(exponent, -127), exponent).clamp_(-127)
    scale = (exponent + 127).to(torch.uint8)
    factor = e8m0_to_float((127 - exponent).to(torch.uint8)).unsqueeze(-1)  # 2^-e: scaling by it is exact
    codes = (blocks * factor).to(torch.float8_e4m3fn)
    decoded = codes.to(torch.float64) * e8m0_to_float(scale).to(torch.float64).unsqueeze(-1)
    check_finite(decoded.to(torch.float32).flatten(-2))
    exact = blocks.to(torch.float64)
    return Encoded(codes.flatten(-2), scale, exact.square().sum(), (exact - decoded).square().sum(), decoded.square().sum())
