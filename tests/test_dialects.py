"""Sources in other dialects: converted through the stages to the bytes that their decoded values demand."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file

from kernels import mxfp4
from kernels.formats import E2M1, decode_int4, decode_mxfp4, decode_mxfp8, decode_nvfp4, encode_mxfp8
from kernels.fp8 import decode_block_fp8
from stages import checkup, evaluate, validate_gemm
from stages.checkpoint.header import TensorInfo
from stages.checkpoint.reader import ShardReader
from stages.checkup import configuring, engine
from stages.dialects import recognize
from stages.dialects.reading import Tensors
from stages.dialects.reading import decoded as decoded_weight
from stages.errors import UserError
from stages.models import step37
from stages.planning.record import read_plan
from stages.receipts import read_receipts
from stages.schemes import kept
from stages.schemes.architectures import architecture_of
from stages.schemes.vllm_rules import ROUTED_EXPERTS, RuntimeModule, coverage_faults
from tests import small_models
from tests.conftest import TINY, convert

CHANNEL = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BLOCKS = {**CHANNEL, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"strategy": "block", "block_structure": [64, 64]}}}}
FOUR_BITS = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}


def channel(weight):
    """[out, in] -> codes and one scale per row."""
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def flat_channel(weight):
    """As Quark writes it: the scales in one dimension."""
    return {name: part.reshape(-1) if name == "weight_scale" else part for name, part in channel(weight).items()}


def whole(weight):
    scale = (weight.abs().amax() / 448).reshape(1)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def microscaled(weight, suffix="weight_scale_inv"):
    made = encode_mxfp8(weight)
    return {"weight": made.codes, suffix: made.scale}


def nibbles(values):
    """E2M1 codes nearest to values, two in a byte, the even column low."""
    table = torch.tensor(E2M1[:8])
    codes = (values.abs().unsqueeze(-1) - table).abs().argmin(-1) + 8 * (values < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def packed_mxfp4(weight, codes="weight_packed", scale="weight_scale"):
    made = mxfp4.quantize(weight)
    deepseek = scale == "scale"
    return {codes: made.packed.view(torch.int8) if deepseek else made.packed,
            scale: made.scale.view(torch.float8_e8m0fnu) if deepseek else made.scale}


def packed_nvfp4(weight, modelopt=False):
    whole = (weight.abs().amax() / (6 * 448)).reshape(1)  # multiplies; compressed-tensors stores what divides
    blocks = weight.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    codes = nibbles((blocks / (scale.float() * whole).unsqueeze(-1)).nan_to_num().flatten(-2))
    if modelopt:
        return {"weight": codes, "weight_scale": scale, "weight_scale_2": whole.reshape(()), "input_scale": torch.ones(())}
    return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": 1 / whole, "input_global_scale": torch.ones(1)}


def packed_int4(weight, zeros=False):
    groups = weight.unflatten(-1, (-1, 32))
    zero = torch.randint(-8, 8, groups.shape[:-1], generator=torch.Generator().manual_seed(0)) if zeros else torch.zeros(groups.shape[:-1]).long()
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(-8, 7).flatten(-2).to(torch.int8)
    parts = {"weight_packed": pack_to_int32(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape, dtype=torch.int32)}
    return parts | ({"weight_zero_point": pack_to_int32(zero.to(torch.int8), 4, packed_dim=0).contiguous()} if zeros else {})


def tiled(weight, name="weight_scale"):
    scale = weight.abs().unflatten(-1, (-1, 64)).unflatten(0, (-1, 64)).amax((1, 3)) / 448
    if name == "scale":
        scale = scale.to(torch.float8_e8m0fnu)
    wide = scale.float().repeat_interleave(64, 0).repeat_interleave(64, 1)
    return {"weight": (weight / wide).to(torch.float8_e4m3fn), name: scale}


def decoded(parts):
    if "weight_shape" in parts:
        zero = parts.get("weight_zero_point")
        shape = tuple(parts["weight_shape"].tolist())
        zero = None if zero is None else unpack_from_int32(zero, 4, torch.Size(parts["weight_scale"].shape), packed_dim=0)
        return decode_int4(parts["weight_packed"], parts["weight_scale"], shape[1], zero)
    if "weight_global_scale" in parts:
        return decode_nvfp4(parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"], reciprocal=True)
    if "weight_scale_2" in parts:
        return decode_nvfp4(parts["weight"], parts["weight_scale"], parts["weight_scale_2"], reciprocal=False)
    codes = parts.get("weight_packed", parts.get("weight"))
    if codes.dtype in (torch.uint8, torch.int8):
        return decode_mxfp4(codes, parts.get("weight_scale", parts.get("scale")))
    scale = next(tensor for name, tensor in parts.items() if name != "weight")
    if scale.dtype == torch.uint8:
        return decode_mxfp8(codes, scale)
    if scale.dim() == 2 and scale.shape[-1] > 1:
        return decode_block_fp8(codes, scale.float(), (64, 64))
    return decode_block_fp8(codes, scale.float().reshape(-1, 1).expand(codes.shape[0], 1), (1, codes.shape[1]))


def checkpoint(directory, store, quantization_config, experts=16):
    """The tiny model with its first experts one by one in another dialect; returns {module: stored parts}."""
    stored, tensors = {}, {}
    source = {}
    for path in sorted(TINY.glob("*.safetensors")):
        source |= load_file(path)
    for name, tensor in source.items():
        if tensor.dtype == torch.float8_e4m3fn:
            prefix, projection = name.removesuffix(".weight").rsplit(".", 1)
            for expert, weight in enumerate(decode_block_fp8(tensor[:experts], source[name + "_scale_inv"][:experts])):
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
    (channel, CHANNEL), (flat_channel, {"quant_method": "quark"}), (lambda weight: {k: v.bfloat16() if k != "weight" else v for k, v in channel(weight).items()}, CHANNEL),
    (whole, CHANNEL), (whole, {"quant_method": "fp8", "activation_scheme": "static"}), (microscaled, MXFP8), (lambda weight: microscaled(weight, "weight_scale"), CHANNEL),
    (tiled, BLOCKS), (lambda weight: tiled(weight, "scale"), {"quant_method": "fp8", "weight_block_size": [64, 64]}),
    (packed_mxfp4, FOUR_BITS), (lambda weight: packed_mxfp4(weight, "weight"), {"quant_method": "quark"}),
    (lambda weight: packed_mxfp4(weight, "weight", "scale"), {"quant_method": "fp8", "expert_dtype": "fp4"}),
    (packed_nvfp4, FOUR_BITS), (lambda weight: packed_nvfp4(weight, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    (packed_int4, INT4), (lambda weight: packed_int4(weight, zeros=True), INT4),
], ids=["per_channel", "per_channel_quark", "per_channel_bf16", "per_tensor", "per_tensor_autofp8", "mxfp8", "mxfp8_named_weight_scale", "compressed_tensors_blocks",
        "e8m0_blocks", "mxfp4", "mxfp4_quark", "mxfp4_deepseek", "nvfp4", "nvfp4_modelopt", "int4", "int4_zero_points"])
def test_a_dialect_becomes_the_mxfp4_of_its_decoded_values(tmp_path, store, quantization_config):
    stored = checkpoint(tmp_path / "model", store, quantization_config)
    settings = convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    assert len(stored) == sum(name.endswith("weight_packed") for name in release) == 240
    for module, parts in list(stored.items())[::7]:
        made = mxfp4.quantize(decoded(parts), rule="mse", backend="reference")
        assert torch.equal(release[f"{module}.weight_packed"], made.packed), module
        assert torch.equal(release[f"{module}.weight_scale"], made.scale), module
    result = checkup.check(settings.run_directory / "release", tmp_path / "model", quick=True)
    assert result["passed"], result


@pytest.mark.parametrize(("store", "quantization_config", "words"), [
    (channel, None, ["quant_method None", "15 FP8 weights with a scale"]),
    (channel, {"quant_method": "fp8"}, ["quant_method 'fp8'"]),
    (channel, {"quant_method": "auto-round"}, ["weight first", "'auto-round' is not read here, get the checkpoint in another format"]),
    (microscaled, {"quant_method": "fp8"}, ["quant_method 'fp8'"]),
    (lambda weight: {**channel(weight), "weight_scale": torch.ones(3, 1)}, CHANNEL,
     ["weight_scale has shape [3, 1]", "[256, 1]"]),
    (lambda weight: {**microscaled(weight), "weight_scale_inv": torch.ones(3, 4, dtype=torch.uint8)}, MXFP8,
     ["U8 [3, 4]", "blocks of 32"]),
    (tiled, CHANNEL, ["one scale per channel is", "another checkpoint"]),
    (lambda weight: {"weight_packed": packed_mxfp4(weight)["weight_packed"]}, FOUR_BITS, ["packed weight", "has no scale"]),
    (lambda weight: {**packed_mxfp4(weight), "weight_scale": torch.ones(3, 4, dtype=torch.uint8)}, FOUR_BITS, ["U8 [3, 4]", "blocks of 32"]),
    (packed_mxfp4, None, ["quant_method None", "MXFP4 weights"]),
    (lambda weight: {k: v for k, v in packed_nvfp4(weight).items() if k != "weight_global_scale"}, FOUR_BITS, ["weight_global_scale is missing"]),
    (lambda weight: packed_int4(weight) | {"weight_g_idx": torch.zeros(256, dtype=torch.int32)}, INT4, ["activation order"]),
    (packed_int4, {**INT4, "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, ["8 bits"]),
    (packed_int4, {**INT4, "config_groups": {key: {"weights": {"num_bits": bits, "type": "int", "group_size": 32}}
                                             for key, bits in (("a", 4), ("b", 8))}}, ["several kinds"]),
    (packed_int4, {**INT4, "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}}}},
     ["not symmetric", "no "]),
    (lambda weight: packed_int4(weight) | {"weight_zero_point": torch.zeros(3, 4, dtype=torch.uint8)}, INT4, ["zero_point is U8", "expected I32"]),
    (packed_int4, {**INT4, "config_groups": []}, ["config_groups: is []"]),
    (packed_int4, {**INT4, "config_groups": {"a": {"weights": {"num_bits": "4"}}}}, ["num_bits is '4'", "whole number"]),
    (channel, {**CHANNEL, "transform_config": {"config_groups": {"u": {}}}}, ["transform_config", "without"]),
    (lambda weight: tiled128(weight) | {"scale": torch.ones(2, 1)}, {"quant_method": "fp8"}, ["has two scales"]),
    (lambda weight: channel(weight) | {"pre_quant_scale": torch.ones(weight.shape[1])}, CHANNEL, ["pre_quant_scale", "not read"]),
    (lambda weight: {"weight": weight.bfloat16(), "qweight": torch.zeros(3, 3, dtype=torch.int32)}, None, ["qweight", "GPTQ"]),
    (lambda weight: {"weight": weight.bfloat16()}, {"quant_method": "gptq"}, ["quant_method 'gptq'", "no tensor is stored"]),
    (lambda weight: {"weight": (weight * 10).to(torch.int8)}, None, ["I8", "no dialect here reads"]),
    (lambda weight: {"weight": weight.bfloat16()}, None, ["experts.1.down_proj: is missing", "has 16 experts"]),
    (lambda weight: {"weight": (weight * 10).to(torch.int8), "weight_scale": torch.ones(len(weight), 1)}, CHANNEL, ["I8", "no dialect here reads"]),
])
def test_a_dialect_that_config_or_shapes_deny_is_refused(tmp_path, store, quantization_config, words):
    checkpoint(tmp_path / "model", store, quantization_config, experts=1)
    with pytest.raises(UserError) as caught:
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def recognized(stored, section, module="model.layers.0.mlp.down_proj"):
    """Claims of one module, part -> (dtype, shape) of its header; a part with a dot before it is no part of the module."""
    tensors = {part[1:] if part.startswith(".") else f"{module}.{part}": TensorInfo(dtype, shape, 0, 0) for part, (dtype, shape) in stored.items()}
    return recognize(tensors, dict.fromkeys(tensors, "model.safetensors"), {"quantization_config": section})


QUARK = {"quant_method": "quark"}
QUARK_MXFP4 = {"weight": ("U8", (256, 64)), "weight_scale": ("U8", (256, 4))}
FOLDED = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False, "online_r1_rotation": False, "online_config": None, "rotation_size": 32}


@pytest.mark.parametrize(("section", "words"), [
    *(({"algo_config": [FOLDED | online]}, "algo_config of rotation that is online")
      for online in ({"online_r1_rotation": True}, {"r3": True}, {"r4": True}, {"online_config": {"use_input_prescale": True}})),
    ({"algo_config": [{"name": "awq"}, FOLDED | {"r4": True}]}, "algo_config of rotation that is online"),
    ({"algo_config": FOLDED | {"r4": True}}, "algo_config of rotation that is online"),
    ({"algo_config": [{"name": "quarot"}]}, "algo_config of an algorithm that is not known here .'quarot'"),
    ({"algo_config": [7]}, "algo_config of an algorithm that is not known here .7"),
    ({"rotation_config": {"algorithm": "spinquant", "online_r1_rotation": True}}, "rotation_config"), ({"spinquant_config": {"r1": True}}, "spinquant_config"),
    ({"hadamard_config": {"block_size": 32}}, "hadamard_config"), ({"online_rotations": ["down_proj"]}, "online_rotations"),
])
def test_what_an_engine_does_to_weights_when_they_run_is_refused(section, words):
    with pytest.raises(UserError, match=f"quantization_config has {words}.*get a checkpoint without it") as caught:
        recognized(QUARK_MXFP4, QUARK | section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [
    {"algo_config": None}, {"algo_config": []}, {"algo_config": [FOLDED, {"name": "gptq"}, {"name": "SmoothQuant"}]}, {"algo_config": {"name": "awq"}},
    {"transform_config": {"config_groups": {}}}, {"sparsity_config": {"format": "dense"}}, {"rotation_config": None}])
def test_what_is_in_the_stored_weights_already_is_accepted(section):
    assert recognized(QUARK_MXFP4, QUARK | section)["model.layers.0.mlp.down_proj.weight"].dialect == "mxfp4"


@pytest.mark.parametrize("name", ["input_rotation", "input_rotation_128", "input_prescale", "spinquant_r1_type", "hadamard_matrix", "svdquant_lora_a",
                                  ".shared_input_rotation_256", ".input_prescale", ".hadamard_matrix", ".model.layers.0.mlp.experts.gate_up_proj_input_rotation"])
def test_a_tensor_that_says_that_inputs_are_changed_is_refused(name):
    with pytest.raises(UserError, match="not what their tensors hold"):
        recognized(QUARK_MXFP4 | {name: ("F16", (32, 32))}, QUARK)


def test_modelopt_may_say_in_a_file_of_its_own_how_it_quantized(tmp_path):
    checkpoint(tmp_path / "model", lambda weight: packed_nvfp4(weight, modelopt=True), None, experts=16)
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(told))
    arguments = ["source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}"]
    release = convert(*arguments).run_directory / "release"
    assert not (release / "hf_quant_config.json").exists()
    assert json.loads((release / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    result = checkup.check(release, tmp_path / "model", quick=True)
    assert result["passed"], result
    (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(told | {"quantization": ["NVFP4"]}))
    with pytest.raises(UserError, match="hf_quant_config.json.* is \\['NVFP4'\\]"):
        convert(*arguments[:2], f"results={tmp_path / 'others'}")


def test_a_source_in_fp8_keeps_its_config(tmp_path):
    """Its scales of activations would be dropped, and nothing would be left that says how it was quantized."""
    checkpoint(tmp_path / "model", lambda weight: whole(weight) | {"input_scale": torch.ones(())}, {"quant_method": "modelopt", "quant_algo": "FP8"})
    before = (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(UserError, match="declares quant_method 'modelopt', and no tensor is MXFP4 or MXFP8: it is of no release"):
        configuring.run(tmp_path / "model", None, dry_run=False)
    assert (tmp_path / "model" / "config.json").read_text() == before


def stacked(directory, make, quantization_config):
    """The tiny model with gate and up of its experts in one 3D tensor, as `make(gate_up, down)` stores them under `moe.experts.`."""
    source = {name: tensor for path in sorted(TINY.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    experts = {name: decode_block_fp8(tensor, source[name + "_scale_inv"]) for name, tensor in source.items() if tensor.dtype == torch.float8_e4m3fn}
    tensors = {name: tensor for name, tensor in source.items() if name not in experts and not name.endswith("_scale_inv")}
    for prefix in {name.rpartition("moe.")[0] for name in experts}:
        gate, up, down = (experts[f"{prefix}moe.{part}_proj.weight"] for part in ("gate", "up", "down"))
        tensors |= {f"{prefix}moe.experts.{name}": tensor for name, tensor in make(gate, up, down).items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", directory)
    config = json.loads((TINY / "config.json").read_text())
    config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization_config} if quantization_config else {})))
    return experts


def test_stacked_nvfp4_with_a_tensor_scale_for_each_expert_is_read(tmp_path):
    """The published Step-3.7-Flash-NVFP4: 3D codes and block scales beside `weight_scale_2` [experts]."""
    stored = {}

    def make(**projections):
        for projection, weights in projections.items():
            parts = [packed_nvfp4(weight * 2.0**(expert % 3), modelopt=True) for expert, weight in enumerate(weights)]
            stored[projection] = parts
        return {f"{projection}_proj.{part}": torch.stack([each[part] for each in parts]) for projection, parts in stored.items() for part in parts[0]}

    stacked(tmp_path / "model", lambda gate, up, down: make(gate=gate, up=up, down=down), {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    source = tmp_path / "model"
    tensors = {name.replace(".moe.experts.", ".moe."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors |= {f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale": torch.ones(1) for layer in range(6) for part in "kv"}  # not of drafts
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = convert(f"source.path={source}", "source=local", f"results={tmp_path / 'results'}")
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    prefix = "model.layers.2.moe"
    for expert in (0, 1, 5):
        parts = {part: tensors[f"{prefix}.down_proj.{part}"][expert] for part in ("weight", "weight_scale", "weight_scale_2")}
        made = mxfp4.quantize(decoded(parts), backend="reference")
        assert torch.equal(release[f"{prefix}.experts.{expert}.down_proj.weight_packed"], made.packed)
    result = checkup.check(settings.run_directory / "release", source)
    assert result["passed"], result
    name = f"{prefix}.down_proj.weight_scale_2"
    tensors[name][3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"moe\.down_proj\.weight_scale_2\[3\] is nan"):
        convert(f"source.path={source}", "source=local", f"results={tmp_path / 'others'}")


def test_scales_of_the_kv_cache_in_quarks_spelling_pass_under_the_name_that_vllm_reads_and_the_plan_says_what_becomes_of_the_cache(tmp_path):
    section = {"quant_method": "quark", "kv_cache_quant_algo": "FP8"}
    checkpoint(tmp_path / "model", channel, section)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    extra = {name.replace(".weight", ".output_scale"): torch.ones(1) * 2 for name in tensors if re.search(r"self_attn\.[qkv]_proj\.weight$", name)}
    unread = {f"model.layers.0.self_attn.{name}": torch.ones(shape) for name, shape in (("prob_output_scale", 1), ("k_zero_point", (4, 1, 1)))}
    save_file(tensors | extra | unread, path, metadata={"format": "pt"})
    settings = convert(f"source.path={tmp_path / 'model'}", "source=local", f"results={tmp_path / 'results'}")
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    assert not {*extra, *unread} & release.keys()
    assert all(release[re.sub(r"([qkv])_proj\.output_scale", r"\1_scale", name)] == 2 for name in extra)
    result = checkup.check(settings.run_directory / "release", tmp_path / "model")
    assert result["passed"], result
    assert any("KV cache" in note for note in read_plan(settings)["notes"])


def fused(gate, up, down):
    return {"gate_up_proj": torch.cat([gate, up], 1).bfloat16(), "down_proj": down.bfloat16()}


def gpt_oss(gate, up, down):
    made = {"gate_up_proj": mxfp4.quantize(torch.stack([gate, up], 2).flatten(1, 2), backend="reference"),
            "down_proj": mxfp4.quantize(down, backend="reference")}
    return {f"{name}_{part}": tensor for name, m in made.items()
            for part, tensor in (("blocks", m.packed.unflatten(-1, (-1, 16))), ("scales", m.scale))}


@pytest.mark.parametrize(("make", "quantization_config"), [(fused, None), (gpt_oss, {"quant_method": "mxfp4"})])
def test_gate_and_up_in_one_tensor_come_apart(tmp_path, make, quantization_config):
    experts = stacked(tmp_path / "model", make, quantization_config)
    settings = convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    assert sum(name.endswith("weight_packed") for name in release) == 240
    for name, weight in experts.items():
        prefix, projection = name.removesuffix(".weight").rsplit(".", 1)
        for expert in (0, 5, 15):
            module, source = f"{prefix}.experts.{expert}.{projection}", weight[expert]
            expected = mxfp4.quantize(source.bfloat16() if make is fused else source, backend="reference")
            ours = decode_mxfp4(release[f"{module}.weight_packed"], release[f"{module}.weight_scale"])
            assert torch.equal(ours, decode_mxfp4(expected.packed, expected.scale)), module
    assert evaluate.sqnr(read_receipts(settings, read_plan(settings)))["matrices"] == 240
    result = checkup.check(settings.run_directory / "release", tmp_path / "model")
    assert result["passed"], result


def test_fp8_that_the_recipe_leaves_is_kept_bit_for_bit_and_declared(tmp_path):
    """Attention in FP8 blocks, shared experts per channel, dense layers in MXFP8, experts in block FP8: only the last are converted."""
    source = {name: tensor for path in sorted(TINY.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    stores = {"self_attn": lambda w: tiled128(w), "share_expert": channel, ".mlp.": lambda w: microscaled(w, "weight_scale")}
    tensors, kept = dict(source), {}
    for name, weight in source.items():
        part = next((part for part in stores if part in name), None)
        if part and name.startswith("model.layers") and name.endswith("_proj.weight") and int(name.split(".")[2]) < 6:
            kept[name] = stores[part](weight.float())
            del tensors[name]
            tensors |= {name.removesuffix("weight") + key: value for key, value in kept[name].items()}
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", model)
    config = json.loads((TINY / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"strategy": "block", "block_structure": [128, 128]}}}}
    (model / "config.json").write_text(json.dumps(config))
    settings = convert("source=local", f"source.path={model}", f"results={tmp_path / 'results'}")
    directory = settings.run_directory / "release"
    release = load_file(directory / "model.safetensors")
    for name, parts in kept.items():
        (scale,) = (value for key, value in parts.items() if key != "weight")
        assert torch.equal(release[name].view(torch.uint8), parts["weight"].view(torch.uint8)) and torch.equal(release[f"{name}_scale"], scale), name
        assert f"{name}_scale_inv" not in release
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    arguments = {(group["format"], group["weights"]["strategy"]) for group in section["config_groups"].values()}
    assert arguments == {("mxfp4-pack-quantized", "group"), ("mxfp8-quantized", "group"), ("float-quantized", "block"), ("float-quantized", "channel")}
    result = checkup.check(directory, model)
    assert result["passed"], result
    ours, theirs = (dict(step37.expanded_tensors(path, torch.float32)) for path in (directory, model))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours if "moe." not in name or "gate.weight" in name)
    changed = load_file(directory / "model.safetensors")
    changed["model.layers.1.self_attn.o_proj.weight_scale"][0, 0] *= 2
    (directory / "model.safetensors").unlink()
    (directory / "manifest.json").unlink()
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    faults = [fault for row in checkup.check(directory, model)["checks"] for fault in row["faults"]]
    assert any("self_attn.o_proj.weight_scale is not bit-identical" in fault for fault in faults), faults


def attention_in(tmp_path, store, weights=None):
    """The tiny model with its attention stored by `store`, converted; the experts are block FP8. weights: of a further group, weight-only."""
    source = {name: tensor for path in sorted(TINY.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for name in [name for name in source if "self_attn" in name and name.endswith("_proj.weight") and int(name.split(".")[2]) < 6]:
        source |= {name.removesuffix("weight") + key: value for key, value in store(name, source.pop(name).float()).items()}
    model = tmp_path / "model"
    model.mkdir()
    save_file(source, model / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", model)
    config = json.loads((TINY / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {
        "a": {"weights": {"block_structure": [128, 128]}}, **({"b": {"weights": weights}} if weights else {})}}
    (model / "config.json").write_text(json.dumps(config))
    return convert("source=local", f"source.path={model}", f"results={tmp_path / 'results'}", "serving=none")


@pytest.mark.parametrize(("store", "weights"), [
    (flat_channel, None), (channel, {"num_bits": 8, "type": "float", "strategy": "channel"}), (whole, {"num_bits": 8, "type": "float", "strategy": "tensor"})])
def test_scales_per_channel_in_one_dimension_and_weights_alone_in_fp8_are_kept_and_verified(tmp_path, store, weights):
    release = attention_in(tmp_path, lambda name, weight: store(weight), weights).run_directory / "release"
    source, made = load_file(tmp_path / "model" / "model.safetensors"), load_file(release / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    assert made[name].shape == ((1,) if store is whole else (len(made[name]), 1)) and torch.equal(made[name].reshape(-1), source[name].reshape(-1))
    config = json.loads((release / "config.json").read_text())
    (group,) = (group for group in config["quantization_config"]["config_groups"].values() if group["weights"]["strategy"] in ("channel", "tensor"))
    assert (group["input_activations"] is None) == bool(weights)
    result = checkup.check(release, tmp_path / "model")
    assert result["passed"], result
    configuring.run(release, None, dry_run=False)
    assert json.loads((release / "config.json").read_text()) == config
    if store is flat_channel:
        made[name][3] *= 2
        (release / "model.safetensors").unlink()
        save_file(made, release / "model.safetensors", metadata={"format": "pt"})
        assert any(f"{name} is not bit-identical" in fault for row in checkup.check(release, tmp_path / "model")["checks"] for fault in row["faults"])


@pytest.mark.parametrize(("change", "words"), [
    (lambda group: group["weights"].update(strategy="block", block_structure=[128, 128]), "is FP8 in blocks without input_activations"),
    (lambda group: group["targets"].append(r"re:.*\.experts\..*"), "no FP8 experts whose activations are not quantized"),
])
def test_weights_alone_in_fp8_where_vllm_has_no_such_form_are_found(change, words):
    group = {"targets": [r"re:.*\.o_proj$"], **kept.group_of("fp8 per channel, weight-only")}
    change(group)
    section = {"config_groups": {"a": group}, "format": kept.FORMAT}
    faults = list(engine.scheme_arguments(SimpleNamespace(config={}, section=section, counts={}, notes=[], tensors={})))
    modules = [RuntimeModule("model.layers.0.mlp.experts", ROUTED_EXPERTS, ("model.layers.0.mlp.experts.0.down_proj",))]
    faults += coverage_faults(modules, section, {"model.layers.0.mlp.experts.0.down_proj": "fp8 per channel"}, architecture_of("Qwen3MoeForCausalLM"))
    assert any(words in fault for fault in faults), faults


def spoilt(part, value, place=(0, 0)):
    def store(name, weight):
        parts = tiled128(weight)
        if "layers.2" in name and "k_proj" in name:
            parts[part].view(torch.uint8 if part == "weight" else torch.float32)[place] = value
        return parts
    return store


@pytest.mark.parametrize(("store", "words"), [
    (spoilt("weight", 0x7F, (3, 5)), r"2\.self_attn\.k_proj\.weight\[3, 5\] is NaN, no number"),
    (spoilt("weight_scale_inv", float("nan"), (0, 1)), r"2\.self_attn\.k_proj\.weight_scale_inv\[0, 1\] is \S+, no number"),
    (spoilt("weight_scale_inv", -1.0), r"k_proj\.weight_scale_inv\[0, 0\] is \S+, no number"),
    (lambda name, weight: channel(weight) if "k_proj" in name else tiled128(weight), r"qkv_proj: one format is needed for all its parts"),
    (lambda name, weight: channel(weight) | {"input_scale": torch.ones(1)}, "activations have a fixed scale"),
    (lambda name, weight: packed_mxfp4(weight), "mxfp4 cannot be kept"),
])
def test_fp8_that_no_engine_would_read_rightly_is_not_kept(tmp_path, store, words):
    with pytest.raises(UserError, match=words):
        attention_in(tmp_path, store)


@pytest.mark.parametrize(("store", "section", "words"), [
    (lambda weight: {"weight": weight.bfloat16().T.contiguous()}, None, "hidden_size is 256 in config.json: it is stored transposed"),
    (lambda weight: packed_int4(weight) | {"weight_shape": torch.tensor([3, 4])}, INT4, r"says \[3, 4\], but .* are those of"),
])
def test_experts_that_are_complete_but_lie_are_refused(tmp_path, store, section, words):
    checkpoint(tmp_path / "model", store, section)
    with pytest.raises(UserError, match=words):
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")


def test_an_nvfp4_scale_that_is_the_reciprocal_of_what_its_name_says_is_noticed(tmp_path):
    def store(weight):
        parts = packed_nvfp4(weight)
        return parts | {"weight_global_scale": 1 / parts["weight_global_scale"]}

    checkpoint(tmp_path / "model", store, FOUR_BITS)
    with pytest.raises(UserError, match="decodes to weights of .* its scales are not those of nvfp4"):
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")


def tiled128(weight):
    """FP8 codes and `weight_scale_inv` in tiles of 128x128, edges ragged."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    scale = padded.abs().unflatten(-1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3)).clamp(min=1e-6) / 448
    wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return {"weight": (weight / wide).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


@pytest.mark.parametrize(("recipe", "decibels"), [("mxfp8_experts", 28), ("mxfp4_experts_mxfp8_rest", 18), ("mxfp4_all_linear", 18)])
def test_mxfp8_and_dense_recipes_make_proven_releases_that_load(tmp_path, recipe, decibels):
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", f"recipe={recipe}", "serving=none")
    directory = settings.run_directory / "release"
    _, _, loading = step37.load(directory, torch.float32)
    assert loading == {"missing": 0, "unexpected": 0}
    assert evaluate.sqnr(read_receipts(settings, read_plan(settings)))["worst_matrix_db"] > decibels
    validate_gemm.run(settings)
    result = checkup.check(directory, TINY)
    assert result["passed"], result
    name = "model.layers.2.moe.experts.3.up_proj"
    tensors = {path: load_file(path) for path in directory.glob("*.safetensors")}
    shard = next(path for path, found in tensors.items() if f"{name}.weight_scale" in found)
    for damage, words in ((lambda t: t[f"{name}.weight_scale"].add_(1), "SQNR against the source's"),
                          (lambda t: t[f"{name}.weight_scale"][0].fill_(255), "which means NaN")):
        found = {key: tensor.clone() for key, tensor in tensors[shard].items()}
        damage(found)
        shard.unlink()
        save_file(found, shard, metadata={"format": "pt"})
        faults = [fault for row in checkup.check(directory, TINY)["checks"] for fault in row["faults"]]
        assert any(words in fault and name in fault for fault in faults), faults


def test_an_e8m0_nan_is_refused_with_tensor_and_index(tmp_path):
    def store(weight):
        parts = microscaled(weight)
        parts["weight_scale_inv"][2, 1] = 255
        return parts

    checkpoint(tmp_path / "model", store, MXFP8)
    with pytest.raises(UserError, match=r"model.safetensors: model\.layers\.1\.moe\.experts\.0\..*weight_scale_inv\[2, 1\]"):
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}")


def test_k_and_v_that_were_quantized_merged_and_split_again_decode_as_they_were_merged(tmp_path):
    """MiMo-V2-Flash: the first of v's rows on each GPU lie in the tile in which k's end, whose scale is stored with k, here in another shard."""
    source = small_models.save("mimo_v2_flash", tmp_path / "source", fp8=True)
    plain, stored = load_file(small_models.save("mimo_v2_flash", tmp_path / "plain") / "model.safetensors"), load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    with ShardReader(source / "model.safetensors") as reader:
        claims = recognize(reader.header.tensors, dict.fromkeys(stored, "model.safetensors"), config)
        for prefix in ("model.layers.0.self_attn.", "model.layers.1.self_attn.", "model.mtp.layers.0.self_attn."):  # full attention, sliding windows
            names = [f"{prefix}{part}_proj.weight" for part in "qkv"]
            found = [decoded_weight(Tensors(lambda name: reader), name, claims[name]).chunk(2) for name in names]
            assert bool(claims[names[1]].scales) == bool(claims[names[2]].scales) == (prefix == "model.layers.0.self_attn.")
            for share, wanted in zip(zip(*found), zip(*(plain[name].chunk(2) for name in names))):
                assert torch.equal(torch.cat(share), decode_block_fp8(*small_models.block_fp8(torch.cat(wanted)))), prefix
    overrides = ["source=local", f"source.path={source}", "recipe=mxfp4_experts_mxfp8_rest", "serving=none"]
    whole = load_file(convert(*overrides, f"results={tmp_path / 'whole'}").run_directory / "release" / "model.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if ".k_proj." not in name}, source / "model.safetensors", {"format": "pt"})
    save_file({name: tensor for name, tensor in stored.items() if ".k_proj." in name}, source / "model-2.safetensors", {"format": "pt"})
    parts = convert(*overrides, f"results={tmp_path / 'parts'}").run_directory / "release"
    split = load_file(parts / "model.safetensors") | load_file(parts / "model-2.safetensors")
    assert split.keys() == whole.keys() and all(torch.equal(split[name], tensor) for name, tensor in whole.items())
    result = checkup.check(parts, source)
    assert result["passed"], result
