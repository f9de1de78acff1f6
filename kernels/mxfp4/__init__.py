"""MXFP4: E2M1 nibbles under one E8M0 scale byte per block of 32 consecutive inputs.

    w_hat = value[nibble] * 2^(scale byte - 127)          value = 0 .5 1 1.5 2 3 4 6, bit 3 is the sign

Packing: the low nibble is the even column. A block's exponent e (scale byte - 127) is chosen from amax = max|w|,
f = floor(log2 amax), e0 = max(f - 2, -127), by one of the rules

    mse        of e0, e0 + 1, e0 - 1 the least sum of squared errors; ties go to the earliest in this order
    ocp_floor  e0                                        OCP MX specification 1.0, torchao FLOOR
    even       e0 + 1 if amax / 2^f >= 1.75 else e0      round amax to E2M1's precision first: torchao EVEN, compressed-tensors
    rceil      the least e with amax <= 6 * 2^e          nothing saturates: torchao RCEIL, NVIDIA

(`even` and `rceil` clamp to -127 last, so amax below 2^-125 cannot push them up.) Elements are rounded to the nearest value,
midpoints to the even nibble; past 6 they saturate; the sign of zero is kept, also of values that round to zero. An all-zero
block has scale byte 0.

`mse` equals the search over all 255 exponents, see tests/kernels. Backends agree to the byte because the decision is exact.
With u = w * 2^-e0 and q the E2M1 value of w * 2^-e, errors of two exponents differ by the difference of

    D(e) = sum over the block of  q^2 4^(e-e0) - 2 u q 2^(e-e0)

Wherever q != 0, |u| > 2^-3, and u has a 24-bit significand, so every term is a multiple of 2^-28 and every partial sum stays
below 2^13: float64 holds all of them, so the order of summation cannot matter. With `importance` terms are multiplied by a
weight per input channel, and products round; there the order is fixed: D starts at 0 and adds fl64(importance * term),
columns ascending, in every backend.

Backends: `reference` (torch, float64, to be read), `cpu` (numba), `cuda` (Triton; also runs in Triton's interpreter).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

from kernels.errors import NonFiniteError
from kernels.mxfp4.rules import RULES

if TYPE_CHECKING:  # who converts arrays by kernels.mxfp4.cpu does without torch
    import torch

__all__ = ["BLOCK", "RULES", "NonFiniteError", "Quantized", "available", "backends", "dequantize", "quantize"]

BLOCK = 32
MODULES = {"reference": "kernels.mxfp4.reference", "cpu": "kernels.mxfp4.cpu", "cuda": "kernels.mxfp4.cuda"}
FLOATS = ("torch.float32", "torch.bfloat16", "torch.float16")


class Quantized(NamedTuple):
    """`quantize`'s result. SQNR in dB is 10 log10(signal / error).

    packed uint8 [..., out, in/2]; scale uint8 [..., out, in/32] (E8M0, exponent + 127); signal = sum w^2, error = sum
    (w - w_hat)^2 and decoded = sum w_hat^2, float64, one figure per matrix: [] for 2D weights, [E] for 3D. The relative error of
    decoded is below 1e-11, that of signal and error below 1e-6 (4e-6 dB): cpu and cuda add the squares of a block in float32.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    signal: torch.Tensor
    error: torch.Tensor
    decoded: torch.Tensor


def available(backend: str) -> bool:
    """Whether this machine can run a backend. TRITON_INTERPRET=1 counts as a GPU, for tests."""
    if backend == "cuda":
        import torch

        gpu = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
        return gpu and importlib.util.find_spec("triton") is not None
    return backend == "reference" or (backend == "cpu" and importlib.util.find_spec("numba") is not None)


def backends() -> list[str]:
    """Names that `quantize` and `dequantize` accept on this machine."""
    return [backend for backend in MODULES if available(backend)]


def backend_module(backend: str, modules: dict[str, str]):
    """Import a backend on first use; ValueError with the choices if this machine cannot run it."""
    if not available(backend):
        raise ValueError(f"backend {backend!r}: this machine has {backends()}")
    return importlib.import_module(modules[backend])


def quantize(
    weight: torch.Tensor,
    tile_scale: torch.Tensor | None = None,
    *,
    rule: str = "mse",
    tile: tuple[int, int] = (128, 128),
    importance: torch.Tensor | None = None,
    backend: str = "cpu",
) -> Quantized:
    """Convert weights to MXFP4.

    Args:
        weight: [out, in] or [E, out, in], `in` a multiple of 32; float8_e4m3fn with `tile_scale`, or float32, bfloat16 or
            float16 without.
        tile_scale: float32, bfloat16 or float16 [..., ceil(out/tile[0]), ceil(in/tile[1])], positive.
        rule: how a block's exponent is chosen, see RULES and the module docstring.
        importance: float32 [in], >= 0 and finite: weight of each input channel in the `mse` rule's error. The reported error
            stays unweighted.
        backend: one of `backends()`; "cuda" takes and returns CUDA tensors (CPU tensors in the interpreter).
    Raises:
        NonFiniteError: names the first weight or tile scale that MXFP4 cannot represent. ValueError: anything else.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: expected one of {RULES}")
    tile_scale = _checked_tile_scale(weight, tile_scale, tile)
    if importance is not None:
        _check_importance(importance, rule, weight.shape[-1])
    module = backend_module(backend, MODULES)
    weight, importance = weight.detach(), None if importance is None else importance.detach()
    flat = weight.unsqueeze(0) if weight.dim() == 2 else weight
    scales = tile_scale.unsqueeze(0) if tile_scale is not None and weight.dim() == 2 else tile_scale
    try:
        result = Quantized(*module.quantize(flat, scales, rule, tuple(tile), importance))
    except NonFiniteError as error:
        if weight.dim() == 2:  # backends work on [E, out, in]
            raise NonFiniteError(error.what, error.index[1:], error.value) from None
        raise
    return Quantized(*(t[0] for t in result)) if weight.dim() == 2 else result


def _checked_tile_scale(weight: torch.Tensor, tile_scale: torch.Tensor | None, tile: tuple[int, int]) -> torch.Tensor | None:
    """`tile_scale` as float32, None where the weight has none; raises what `quantize` does for a weight, its scales and their tile."""
    import torch

    from kernels.fp8 import check_tile_scale

    if weight.dim() not in (2, 3) or weight.shape[-1] % BLOCK:
        raise ValueError(f"weight shape {tuple(weight.shape)}: expected [out, in] or [E, out, in] with in a multiple of {BLOCK}")
    if weight.dtype == torch.float8_e4m3fn:
        if tile_scale is None:
            raise ValueError(f"weight {tuple(weight.shape)} is float8_e4m3fn: tile_scale is missing")
        if min(tile) < 1:
            raise ValueError(f"tile {tile}: expected positive sizes")
        return check_tile_scale(tile_scale, tuple(weight.shape), tile)
    if str(weight.dtype) not in FLOATS:
        raise ValueError(f"weight dtype {weight.dtype}: expected float8_e4m3fn, float32, bfloat16 or float16")
    if tile_scale is not None:
        raise ValueError(f"weight {tuple(weight.shape)} is {weight.dtype}: tile_scale belongs to float8_e4m3fn only")
    return None


def _check_importance(importance: torch.Tensor, rule: str, columns: int) -> None:
    """ValueError for an importance that `quantize` does not take."""
    import torch

    if rule != "mse":
        raise ValueError(f"importance has no meaning for rule {rule!r}: only mse measures an error")
    if importance.dtype != torch.float32 or tuple(importance.shape) != (columns,):
        raise ValueError(f"importance {importance.dtype} {tuple(importance.shape)}: expected float32 ({columns},)")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("importance has negative or non-finite elements")


def dequantize(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None, *, backend: str = "cpu") -> torch.Tensor:
    """Decode MXFP4: packed uint8 [..., out, in/2], scale uint8 [..., out, in/32] -> `dtype` (float32) [..., out, in].

    float32 holds every value (subnormals included) as long as the scale byte is at most 252; above, the larger nibbles
    overflow to infinity, but `quantize` writes no such scale. bfloat16 and float16 round once, from the float32 value.

    Raises:
        NonFiniteError: scale byte 255 (E8M0's NaN). ValueError: wrong dtype or shape.
    """
    import torch

    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(f"packed {packed.dtype} and scale {scale.dtype}: expected uint8 for both")
    if packed.dim() < 2 or packed.shape[:-1] != scale.shape[:-1] or packed.shape[-1] * 2 != scale.shape[-1] * BLOCK:
        raise ValueError(f"packed {tuple(packed.shape)} and scale {tuple(scale.shape)}: expected [..., out, in/2] and [..., out, in/{BLOCK}]")
    dtype = dtype or torch.float32
    if str(dtype) not in FLOATS:
        raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float16")
    check_block_scale(scale)
    return backend_module(backend, MODULES).dequantize(packed, scale, dtype)


def check_block_scale(scale: torch.Tensor) -> None:
    """Raise NonFiniteError at the first E8M0 byte 255."""
    from kernels.fp8 import first_index

    bad = scale == 255
    if bad.any():
        raise NonFiniteError("block scale", first_index(bad), float("nan"))
