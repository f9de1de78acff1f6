"""Sources in other FP8 dialects: converted through the stages to the bytes that their decoded values demand."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import mxfp4
from kernels.fp8 import decode_block_fp8
from kernels.formats import decode_mxfp8, encode_mxfp8
from stages.errors import UserError
from tests.conftest import TINY, convert

CHANNEL = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}


def channel(weight):
    """[out, in] -> codes and one scale per row."""
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def whole(weight):
    scale = (weight.abs().amax() / 448).reshape(1)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def microscaled(weight, suffix="weight_scale_inv"):
    made = encode_mxfp8(weight)
    return {"weight": made.codes, suffix: made.scale}


def decoded(parts):
    codes = parts["weight"]
    scale = next(tensor for name, tensor in parts.items() if name != "weight")
    if scale.dtype == torch.uint8:
        return decode_mxfp8(codes, scale)
    return decode_block_fp8(codes, scale.float().reshape(-1, 1).expand(codes.shape[0], 1), (1, codes.shape[1]))


def checkpoint(directory, store, quantization_config):
    """The tiny model with its experts one by one in another dialect; returns {module: stored parts}."""
    stored, tensors = {}, {}
    source = {}
    for path in sorted(TINY.glob("*.safetensors")):
        source |= load_file(path)
    for name, tensor in source.items():
        if tensor.dtype == torch.float8_e4m3fn:
            prefix, projection = name.removesuffix(".weight").rsplit(".", 1)
            for expert, weight in enumerate(decode_block_fp8(tensor, source[name + "_scale_inv"])):
                stored[f"{prefix}.experts.{expert}.{projection}"] = store(weight)
        elif not name.endswith("_scale_inv"):
            tensors[name] = tensor
    tensors |= {f"{module}.{part}": tensor for module, parts in stored.items() for part, tensor in parts.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", directory)
    config = json.loads((TINY / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config))
    return stored


@pytest.mark.parametrize(("store", "quantization_config"), [
    (channel, CHANNEL), (lambda weight: {k: v.bfloat16() if k != "weight" else v for k, v in channel(weight).items()}, CHANNEL),
    (whole, CHANNEL), (microscaled, MXFP8), (lambda weight: microscaled(weight, "weight_scale"), CHANNEL),
], ids=["per_channel", "per_channel_bf16", "per_tensor", "mxfp8", "mxfp8_named_weight_scale"])
def test_an_fp8_dialect_becomes_the_mxfp4_of_its_decoded_values(tmp_path, store, quantization_config):
    stored = checkpoint(tmp_path / "model", store, quantization_config)
    settings = convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    assert len(stored) == sum(name.endswith("weight_packed") for name in release) == 240
    for module, parts in list(stored.items())[::7]:
        made = mxfp4.quantize(decoded(parts), rule="mse", backend="reference")
        assert torch.equal(release[f"{module}.weight_packed"], made.packed), module
        assert torch.equal(release[f"{module}.weight_scale"], made.scale), module


@pytest.mark.parametrize(("store", "quantization_config", "words"), [
    (channel, None, ["quant_method None", "480 FP8 weights and scales"]),
    (channel, {"quant_method": "fp8"}, ["quant_method 'fp8'"]),
    (microscaled, {"quant_method": "fp8"}, ["quant_method 'fp8'"]),
    (lambda weight: {**channel(weight), "weight_scale": torch.ones(3, 1)}, CHANNEL,
     ["weight_scale has shape [3, 1]", "[256, 1]"]),
    (lambda weight: {**microscaled(weight), "weight_scale_inv": torch.ones(3, 4, dtype=torch.uint8)}, MXFP8,
     ["U8 [3, 4]", "blocks of 32"]),
])
def test_a_dialect_that_config_or_shapes_deny_is_refused(tmp_path, store, quantization_config, words):
    checkpoint(tmp_path / "model", store, quantization_config)
    with pytest.raises(UserError) as caught:
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_e8m0_nan_is_refused_with_tensor_and_index(tmp_path):
    def store(weight):
        parts = microscaled(weight)
        parts["weight_scale_inv"][2, 1] = 255
        return parts

    checkpoint(tmp_path / "model", store, MXFP8)
    with pytest.raises(UserError, match=r"model.safetensors: model\.layers\.1\.moe\.experts\.0\..*weight_scale_inv\[2, 1\]"):
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
