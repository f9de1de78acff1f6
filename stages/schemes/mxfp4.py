"""MXFP4 in compressed-tensors: `weight_packed` U8 [out, in/2] and `weight_scale` U8 [out, in/32] per linear weight."""

from __future__ import annotations

from stages.schemes.modules import Output, pair

NAME = "mxfp4"
LABEL = "MXFP4 (E2M1 values, one E8M0 scale per 32 inputs)"
NEEDS = ("MXFP4 needs compute capability 8.0; weights stay 4 bits with BF16 activations (Marlin) but for B200 and B300, where activations become "
         "4 bits, too")
FORMAT = "mxfp4-pack-quantized"
CODES, CODES_DTYPE, WEIGHTS_PER_CODE = "weight_packed", "U8", 2
HIGH_CODE = (5, "3")  # and its value: every rule puts a block's largest element at this code or above
BLOCK = 32
BYTES_PER_BLOCK = 16 + 1
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True,
           "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
ACTIVATIONS = None  # weight-only


def outputs(name: str, shape: tuple[int, ...], layout: str) -> list[Output]:
    """The release's tensors made from source weight `name` of shape [out, in] or [experts, out, in]."""
    return pair(name, shape, layout, (CODES, "weight_scale"), (CODES_DTYPE, "U8"), (shape[-1] // WEIGHTS_PER_CODE, shape[-1] // BLOCK))


def quantize(weight, tile_scale, tile, rule, backend, memory=None):
    """Rows in float, or FP8 codes and their tile scales -> (codes, scale, [signal, error, decoded]); arrays, see kernels/arrays.py.

    In `memory`, flat uint8 and large enough, the codes may lie until it is used again: fresh pages for each matrix cost as much as
    a third of converting it.
    """
    if backend == "cpu":
        from kernels.mxfp4.cpu import quantize_matrix

        packed = None if memory is None else memory[:weight.size // 2].reshape(len(weight), -1)
        codes, scale, sums = quantize_matrix(weight, tile_scale, rule=rule, tile=tile, packed=packed)
        return codes, scale, sums.tolist()

    from kernels import mxfp4

    made = mxfp4.quantize(*on_device(weight, tile_scale, backend), rule=rule, tile=tile, backend=backend)
    return made.packed.cpu().numpy(), made.scale.cpu().numpy(), [float(made.signal), float(made.error), float(made.decoded)]


def on_device(weight, tile_scale, backend):
    """Arrays as tensors where a backend wants them."""
    import torch

    from stages.dialects.reading import as_tensors

    device = "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"
    return [part if part is None else part.to(device) for part in as_tensors(weight, tile_scale)]


def dequantize(codes, scale):
    """Codes and scales of the release -> float32."""
    import torch

    from kernels import mxfp4

    return mxfp4.dequantize(codes, scale, torch.float32, backend="cpu")
