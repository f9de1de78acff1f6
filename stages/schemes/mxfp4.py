"""MXFP4 in compressed-tensors: `weight_packed` U8 [out, in/2] and `weight_scale` U8 [out, in/32] per linear weight."""

from __future__ import annotations

from stages.schemes.modules import Output, pair

NAME = "mxfp4"
FORMAT = "mxfp4-pack-quantized"
CODES = "weight_packed"
BLOCK = 32
BYTES_PER_BLOCK = 16 + 1
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True,
           "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
ACTIVATIONS = None  # weight-only


def outputs(name: str, shape: tuple[int, ...], layout: str) -> list[Output]:
    """The release's tensors made from source weight `name` of shape [out, in] or [experts, out, in]."""
    return pair(name, shape, layout, (CODES, "weight_scale"), ("U8", "U8"), (shape[-1] // 2, shape[-1] // BLOCK))


def quantize(weight, tile_scale, tile, rule, backend):
    """Rows in float, or FP8 codes and their tile scales -> (codes, scale, [signal, error, decoded])."""
    from kernels import mxfp4

    made = mxfp4.quantize(weight, tile_scale, rule=rule, tile=tile, backend=backend)
    return made.packed, made.scale, [float(made.signal), float(made.error), float(made.decoded)]


def dequantize(codes, scale):
    """Codes and scales of the release -> float32, by the reference."""
    import torch

    from kernels import mxfp4

    return mxfp4.dequantize(codes, scale, torch.float32, backend="reference")
