"""y = x @ dequant(w)^T with MXFP4 weights and activations left as they are (weight-only, W4A16).

    linear          y[t, n] = sum_k x[t, k] w[n, k]
    grouped_linear  y[t, n] = sum_k x[t, k] w[g(t), n, k]       rows offsets[g] .. offsets[g + 1] of x belong to expert g

Products are summed in float32 (float64 in `reference`) and rounded to x's dtype once. They exist to prove that a converted
checkpoint computes what its source does, and to measure it; serving engines bring their own kernels.
"""

import torch

from kernels.mxfp4 import backend_module, check_block_scale

__all__ = ["grouped_linear", "linear"]

MODULES = {"reference": "kernels.gemm.reference", "cpu": "kernels.gemm.cpu", "cuda": "kernels.gemm.cuda"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *, backend: str = "cpu") -> torch.Tensor:
    """x float [T, in] times MXFP4 weights, packed uint8 [out, in/2] and scale uint8 [out, in/32] -> x's dtype [T, out].

    Backend "reference" returns float64. Raises ValueError for shapes or dtypes, NonFiniteError for scale byte 255.
    """
    if packed.dim() != 2:
        raise ValueError(f"packed shape {tuple(packed.shape)}: expected [out, in/2]")
    check(x, packed, scale)
    offsets = torch.tensor([0, len(x)], device=x.device)
    return backend_module(backend, MODULES).grouped_linear(x, packed.unsqueeze(0), scale.unsqueeze(0), offsets)


def grouped_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, expert_offsets: torch.Tensor, *, backend: str = "cpu"
) -> torch.Tensor:
    """Each expert's rows of x times that expert's weights.

    Args:
        x: float [T, in], rows sorted by expert. packed: uint8 [E, out, in/2]. scale: uint8 [E, out, in/32].
        expert_offsets: int32 or int64 [E + 1], non-decreasing from 0 to T; equal neighbours are an expert without rows.
    Returns:
        [T, out], x's dtype ("reference": float64).
    Raises:
        ValueError: shapes, dtypes or offsets. NonFiniteError: scale byte 255.
    """
    if packed.dim() != 3:
        raise ValueError(f"packed shape {tuple(packed.shape)}: expected [E, out, in/2]")
    check(x, packed, scale)
    if expert_offsets.dtype not in (torch.int32, torch.int64) or tuple(expert_offsets.shape) != (len(packed) + 1,):
        raise ValueError(f"expert_offsets {expert_offsets.dtype} {tuple(expert_offsets.shape)}: expected int32 or int64 ({len(packed) + 1},)")
    steps = expert_offsets.diff()
    if int(expert_offsets[0]) != 0 or int(expert_offsets[-1]) != len(x) or bool((steps < 0).any()):
        raise ValueError(f"expert_offsets {expert_offsets.tolist()[:8]}...: expected to rise from 0 to T = {len(x)}")
    return backend_module(backend, MODULES).grouped_linear(x, packed, scale, expert_offsets.to(x.device))


def check(x, packed, scale):
    """The part of the preconditions that both functions share."""
    if x.dtype not in FLOATS or x.dim() != 2:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [T, in]")
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(f"packed {packed.dtype} and scale {scale.dtype}: expected uint8 for both")
    if packed.shape[-1] * 2 != x.shape[1] or x.shape[1] % 32 or tuple(scale.shape) != (*packed.shape[:-1], x.shape[1] // 32):
        raise ValueError(f"x {tuple(x.shape)}, packed {tuple(packed.shape)}, scale {tuple(scale.shape)}: in does not match")
    check_block_scale(scale)
