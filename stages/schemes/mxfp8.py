"""MXFP8 in compressed-tensors: `weight` F8_E4M3 [out, in] and `weight_scale` U8 [out, in/32] per linear weight.

Twice the bytes of MXFP4 and about 31 dB: for what must not lose more. The exponent is the least at which nothing saturates,
whatever rule the recipe names for MXFP4.
"""

from __future__ import annotations

from stages.schemes.modules import Output, pair

NAME = "mxfp8"
LABEL = "MXFP8 (E4M3 values, one E8M0 scale per 32 inputs)"
NEEDS = "MXFP8 needs compute capability 7.5"
FORMAT = "mxfp8-quantized"
CODES, CODES_DTYPE, WEIGHTS_PER_CODE = "weight", "F8_E4M3", 1
HIGH_CODE = (0x70, "128")  # and its value: a block's largest element is at this code or above
BLOCK = 32
BYTES_PER_BLOCK = 32 + 1
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True,
           "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
ACTIVATIONS = None


def outputs(name: str, shape: tuple[int, ...], layout: str) -> list[Output]:
    """The release's tensors made from source weight `name` of shape [out, in] or [experts, out, in]."""
    return pair(name, shape, layout, (CODES, "weight_scale"), (CODES_DTYPE, "U8"), (shape[-1] // WEIGHTS_PER_CODE, shape[-1] // BLOCK))


def quantize(weight, tile_scale, tile, rule, backend, memory=None):
    """Rows in float, or FP8 codes and their tile scales -> (codes, scale, [signal, error, decoded]); arrays, see kernels/arrays.py."""
    if backend != "reference":  # there is no kernel for GPUs
        from kernels.mxfp8 import encode_matrix

        codes, scale, sums = encode_matrix(weight, tile_scale, tile)
        return codes, scale, sums.tolist()

    import torch

    from kernels.formats import encode_mxfp8
    from kernels.fp8 import decode_block_fp8
    from stages.dialects.reading import as_tensors

    weight, tile_scale = as_tensors(weight, tile_scale)
    made = encode_mxfp8(weight if tile_scale is None else decode_block_fp8(weight, tile_scale, tile))
    return made.codes.view(torch.uint8).numpy(), made.scale.numpy(), [float(made.signal), float(made.error), float(made.decoded)]


def dequantize(codes, scale):
    """Codes and scales of the release -> float32."""
    from kernels.formats import decode_mxfp8

    return decode_mxfp8(codes, scale)
