"""The bundled tiny model has the traits of the real release that have broken converters, and its script still makes it."""

import json
import subprocess
import sys

from stages.checkpoint.header import read_header
from tests.conftest import PROJECT, TINY

HEADERS = {path.name: read_header(path) for path in sorted(TINY.glob("*.safetensors"))}
CONFIG = json.loads((TINY / "config.json").read_text())


def traits(headers):
    return {name: (shard, info.dtype, info.shape) for shard, header in headers.items() for name, info in header.tensors.items()}


def test_the_index_omits_the_scales_and_nothing_else():
    listed = set(json.loads((TINY / "model.safetensors.index.json").read_text())["weight_map"])
    omitted = set(traits(HEADERS)) - listed
    assert len(omitted) == 15 and all(name.endswith("weight_scale_inv") for name in omitted)


def test_the_first_the_last_and_the_vision_shard_hold_no_fp8():
    fp8 = [shard for shard, header in HEADERS.items() if any(i.dtype == "F8_E4M3" for i in header.tensors.values())]
    assert fp8 == ["model-00002.safetensors", "model-00003.safetensors", "model-00004.safetensors"]
    assert len(HEADERS) == 6


def test_experts_are_stacked_fp8_with_float_tiles_and_the_router_bias_is_float():
    found = traits(HEADERS)
    assert found["model.layers.3.moe.down_proj.weight"][1:] == ("F8_E4M3", (16, 256, 128))
    assert found["model.layers.3.moe.down_proj.weight_scale_inv"][1:] == ("F32", (16, 2, 1))
    assert found["model.layers.3.moe.router_bias"][1:] == ("F32", (16,))
    others = {dtype for name, (_, dtype, _) in found.items() if "moe." not in name}
    assert others == {"BF16"}


def test_per_layer_lists_include_the_mtp_layers_and_types_are_mixed():
    text = CONFIG["text_config"]
    layers = text["num_hidden_layers"] + text["num_nextn_predict_layers"]
    assert (text["num_hidden_layers"], text["num_nextn_predict_layers"]) == (6, 3)
    for key in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        assert len(text[key]) == layers, key
    assert set(text["layer_types"]) == {"full_attention", "sliding_attention"}
    assert text["swiglu_limits"][4:6] == [7, 7] and text["swiglu_limits_shared"][4:6] == [16, 16]
    assert text["attention_other_setting"]["num_attention_heads"] != text["num_attention_heads"]


def test_modules_to_not_convert_are_runtime_names():
    names = CONFIG["quantization_config"]["modules_to_not_convert"]
    assert {"model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj", "model.layers.6.mtp_block.self_attn.o_proj",
            "vision_model.transformer.resblocks.1.mlp.fc1", "vit_large_projector"} <= set(names)
    assert not any(".experts" in name for name in names) and len(names) == len(set(names))


def test_the_model_fits_a_repository():
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 25e6


def test_the_script_makes_a_checkpoint_of_exactly_this_form(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in [PROJECT / "tests/tiny/held_out.txt", PROJECT / "README.md",
                                                          *sorted((PROJECT / "docs").glob("*.md"))]) * 2)
    subprocess.run([sys.executable, "-m", "tests.tiny.make_tiny", "--text", str(text), "--minutes", "0.0001", "--output",
                    str(tmp_path / "made")], cwd=PROJECT, check=True, capture_output=True)
    made = {path.name: read_header(path) for path in sorted((tmp_path / "made").glob("*.safetensors"))}
    assert traits(made) == traits(HEADERS)
    assert json.loads((tmp_path / "made/config.json").read_text()) == CONFIG
