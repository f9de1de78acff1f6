"""MXFP4 in plain float64 torch: the truth that the other backends are compared with, byte for byte.

Written to be read against kernels/mxfp4/__init__.py's docstring; speed and memory are not its business (about 60 bytes of
temporaries per weight). Float64 represents every quantity in the decision exactly, see there.
"""

import torch

from kernels.fp8 import check_finite, decode_block_fp8

BLOCK = 32
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours; a tie goes to the even code


def power(e: torch.Tensor) -> torch.Tensor:
    """2^e in float64 for integer e."""
    return torch.ldexp(torch.ones_like(e, dtype=torch.float64), e)


def round_to_code(magnitude: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 magnitude code (0-7) of float64 values >= 0, ties to even, saturating."""
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, midpoint in enumerate(MIDPOINTS):
        # the tie is between `lower` and `lower + 1`: it goes up where `lower` is odd
        code += (magnitude >= midpoint) if lower % 2 else (magnitude > midpoint)
    return code


def floor_log2(amax: torch.Tensor) -> torch.Tensor:
    """floor(log2 amax), exact, int32; -2000 for zero, below any real exponent."""
    _, exponent = torch.frexp(amax)  # amax = m * 2^exponent with m in [.5, 1)
    return torch.where(amax > 0, exponent - 1, torch.full_like(exponent, -2000))


def error_terms(u: torch.Tensor, change: int) -> torch.Tensor:
    """q^2 4^change - 2 u q 2^change per element, the squared error less u^2, for exponent e0 + change; exact."""
    q = VALUES[round_to_code(u.abs() * 2.0**-change).long()] * 2.0**change
    return q * q - 2 * u.abs() * q


def block_error(terms: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """D per block. Weighted sums round, so they run over the columns in order."""
    if importance is None:
        return terms.sum(-1)
    total = torch.zeros(terms.shape[:-1], dtype=torch.float64)
    for column in range(BLOCK):
        total = total + importance[..., column] * terms[..., column]
    return total


def choose_exponent(blocks: torch.Tensor, rule: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Exponent e (int32 [..., n]) of float64 blocks [..., n, 32] under `rule`; importance float64 [n, 32]."""
    amax = blocks.abs().amax(-1)
    f = floor_log2(amax)
    e0 = (f - 2).clamp(min=-127)
    if rule == "ocp_floor":
        return e0
    if rule == "even":
        return (f - 2 + (amax >= 1.75 * power(f)).int()).clamp(min=-127)
    if rule == "rceil":
        return (f - 2 + (amax > 6 * power(f - 2)).int()).clamp(min=-127)
    u = blocks * power(-e0).unsqueeze(-1)
    best, least = torch.zeros_like(e0), block_error(error_terms(u, 0), importance)
    for change in (1, -1):
        error = block_error(error_terms(u, change), importance)
        better = (error < least) & (e0 + change >= -127) & (e0 + change <= 127)
        best = torch.where(better, change, best)
        least = torch.where(better, error, least)
    return e0 + best


def quantize(weight, tile_scale, rule, tile, importance):
    """[E, out, in] -> packed, scale, signal, error, decoded; arguments checked by kernels.mxfp4.quantize."""
    if tile_scale is not None:
        weight = decode_block_fp8(weight, tile_scale, tile)
    check_finite(weight)
    experts, out, columns = weight.shape
    blocks = weight.to(torch.float64).reshape(experts, out, columns // BLOCK, BLOCK)
    if importance is not None:
        importance = importance.to(torch.float64).reshape(columns // BLOCK, BLOCK)
    e = choose_exponent(blocks, rule, importance)
    code = round_to_code(blocks.abs() * power(-e).unsqueeze(-1))
    decoded = torch.copysign(VALUES[code.long()], blocks) * power(e).unsqueeze(-1)
    code = (code | (torch.signbit(blocks).to(torch.uint8) << 3)).reshape(experts, out, columns)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    each = (1, 2, 3)
    return packed, (e + 127).to(torch.uint8), (blocks**2).sum(each), ((blocks - decoded) ** 2).sum(each), (decoded**2).sum(each)


def dequantize(packed, scale, dtype):
    """Nibbles to values, times 2^(scale - 127) in float64, rounded to float32 and then to `dtype`."""
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    magnitude = VALUES[(code & 7).long()]
    value = torch.where(code > 7, -magnitude, magnitude).unflatten(-1, (-1, BLOCK))
    return (value * power(scale.to(torch.int32) - 127).unsqueeze(-1)).flatten(-2).to(torch.float32).to(dtype)
