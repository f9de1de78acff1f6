"""Other tools read our bytes as we do, and write the same ones where the rule is the same."""

import pytest
import torch
from kernel_cases import float_blocks, generator

from kernels.mxfp4 import dequantize, quantize


def spread(seed: int) -> torch.Tensor:
    """Gaussian rows over 120 binades, with rows of zeros; blocks within what every tool handles (no subnormal weights)."""
    g = generator(seed)
    weight = torch.randn(96, 256, generator=g) * torch.exp2(torch.randint(-60, 60, (96, 1), generator=g).float())
    weight[5] = 0
    return weight


def compressed_tensors_scheme():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    if not hasattr(compressors, "MXFP4PackedCompressor"):
        pytest.skip("this compressed-tensors has no MXFP4PackedCompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="float", group_size=32, strategy="group", symmetric=True, scale_dtype=torch.uint8)
    return compressors.MXFP4PackedCompressor, QuantizationScheme(targets=["Linear"], weights=weights)


def test_compressed_tensors_decompresses_our_bytes_to_our_values():
    compressor, scheme = compressed_tensors_scheme()
    for weight in (spread(1), float_blocks()["heavy_tailed"], float_blocks()["ties_at_midpoints"]):
        made = quantize(weight)
        theirs = compressor.decompress({"weight_packed": made.packed, "weight_scale": made.scale}, scheme)["weight"]
        ours = dequantize(made.packed, made.scale, theirs.dtype)
        assert torch.equal(theirs, ours) and torch.equal(theirs.signbit(), ours.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_writes_the_bytes_of_rule_even(dtype):
    compressor, scheme = compressed_tensors_scheme()
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = spread(2).to(dtype)
    amax = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    scale, _ = calculate_qparams(-amax, amax, scheme.weights)
    theirs = compressor.compress({"weight": weight, "weight_scale": scale.to(dtype)}, scheme)
    ours = quantize(weight, rule="even")
    assert torch.equal(theirs["weight_scale"], ours.scale) and torch.equal(theirs["weight_packed"], ours.packed)


@pytest.mark.parametrize("mode, rule", [("FLOOR", "ocp_floor"), ("EVEN", "even"), ("RCEIL", "rceil")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_writes_the_bytes_of_the_rule_of_that_name(mode, rule, dtype):
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    weight = spread(3).to(dtype)
    scale, packed = module.to_mx(weight, torch.float4_e2m1fn_x2, 32, getattr(module.ScaleCalculationMode, mode))
    ours = quantize(weight, rule=rule)
    assert torch.equal(scale.view(torch.uint8), ours.scale) and torch.equal(packed.view(torch.uint8), ours.packed)
