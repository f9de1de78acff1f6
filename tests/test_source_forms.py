"""Plans of a small Qwen3-MoE in the forms in which tools store one: what each tensor becomes, and what is refused; headers alone, no weights."""

import dataclasses
import json
from functools import partial

import pytest

from stages.dialects.config import declared, read_source_config
from stages.errors import UserError
from stages.planning.outputs import outputs_of, release_config
from stages.schemes import kept
from tests.meta_checkpoints import Family, attention, body, expand, experts
from tests.test_families import planned

LAYERS = "model.layers.[0-1]"
TENSORS = expand(body("model", 256, 512, "0-1") + attention(f"{LAYERS}.self_attn", 256, 256, 128, "bf16")
                 + f"\nBF16 64 {LAYERS}.self_attn.[q_norm,k_norm].weight\nBF16 2x256 {LAYERS}.mlp.gate.weight"
                 + experts(f"{LAYERS}.mlp.experts.[0-1]", 256, 128, "bf16"))
CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
EXPERT, K_PROJ = "model.layers.1.mlp.experts.0.down_proj", "model.layers.1.self_attn.k_proj"


def stored(section, extra=(), config=(), **stores):
    """The model with its experts and its attention stored as `experts` and `attention` say: shape -> {part: (dtype, shape)}."""
    tensors = dict(extra)
    for name, (dtype, shape) in TENSORS.items():
        store = stores.get("experts" if ".experts." in name else "attention" if "_proj." in name else "")
        made = store(*shape) if store else {"weight": (dtype, shape)}
        tensors |= {name.removesuffix("weight") + part: entry for part, entry in made.items()}
    return Family("small", CONFIG | ({"quantization_config": section} if section else {}) | dict(config), lambda: tensors)


def tiles(rows, columns, scale="weight_scale_inv"):
    return {"weight": ("F8_E4M3", (rows, columns)), scale: ("F32", (-(-rows // 128), -(-columns // 128)))}


def mxfp4(rows, columns):
    return {"weight": ("U8", (rows, columns // 2)), "weight_scale": ("U8", (rows, columns // 32))}


def stacked(tensors):
    """Experts of a layer in two tensors of block FP8, as transformers 5 saves them."""
    found = {name: entry for name, entry in tensors.items() if ".experts." not in name or ".experts.gate_up_proj" in name}
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 256, 256), ("down_proj", 256, 128)):
            weight = f"model.layers.{layer}.mlp.experts.{name}"
            found |= {weight: ("F8_E4M3", (2, rows, columns)), f"{weight}_scale_inv": ("F32", (2, rows // 128, columns // 128))}
    return found


@pytest.mark.parametrize("name", [f"{EXPERT}.input_smooth", f"{EXPERT}.rotation.matrix", f"{K_PROJ}.input_zero_point", f"{K_PROJ}.smooth_bias",
                                  "model.layers.0.mlp.experts.gate_up_proj_smooth"])
def test_a_tensor_of_a_quantized_linear_that_nobody_knows_is_refused(tmp_path, name):
    family = stored(BLOCKS, {name: ("F32", (1,))}, experts=tiles, attention=tiles)
    if "gate_up" in name:
        family = dataclasses.replace(family, tensors=partial(stacked, family.tensors()))
    with pytest.raises(UserError, match=rf"{name} \(F32 \[1\]\) belongs to .*, and what it does to that weight or its inputs is not known here"):
        planned(tmp_path, family)


def test_a_tensor_that_nobody_knows_is_refused_beside_a_plain_weight_only_where_that_is_quantized(tmp_path):
    beside = {K_PROJ.replace(".1.", f".{layer}.") + ".observer": ("F32", (1,)) for layer in range(2)}
    planned(tmp_path, stored(None, beside))
    with pytest.raises(UserError, match="k_proj.observer .* belongs to .*k_proj.weight"):
        planned(tmp_path, stored(None, beside), "mxfp4_experts_mxfp8_rest")


def test_what_an_engine_knows_beside_a_quantized_linear_passes(tmp_path):
    beside = {f"model.layers.{layer}.self_attn.{name}": ("F32", (1,)) for layer in range(2) for name in (
        "k_proj.bias", "k_proj.k_scale", "v_proj.v_scale", "k_proj.k_zero_point", "k_proj.output_scale", "attn.q_scale", "sinks")}
    made = planned(tmp_path, stored(BLOCKS, beside, experts=tiles, attention=tiles))
    assert {made["tensors"][name]["decision"] for name in beside} == {"pass through"}


@pytest.mark.parametrize(("name", "shape", "written"), [
    ("k_proj.output_scale", (1,), ["k_scale"]), ("q_proj.output_scale", (), ["q_scale"]), ("k_proj.k_scale", (), ["k_proj.k_scale"]),
    ("k_scale", (2, 1, 1), []), ("k_proj.output_scale", (2, 1), []), ("v_zero_point", (2, 1, 1), []), ("prob_output_scale", (1,), []), ("prob_zero_point", (1,), []),
])
def test_scales_of_the_kv_cache_become_what_vllm_reads_without_a_scheme_of_it(tmp_path, name, shape, written):
    scale = f"model.layers.0.self_attn.{name}"
    made = planned(tmp_path, stored({"quant_method": "quark"}, {scale: ("F32", shape)}, experts=channels))
    outputs = outputs_of(scale, made["tensors"][scale], "per_expert")
    assert [output.name for output in outputs] == [f"model.layers.0.self_attn.{part}" for part in written]
    assert any(f"1 scales of attention are left out ({scale}" in note for note in made["notes"]) == (not written)


@pytest.mark.parametrize("kind", ["act_scale", "activation_scale", "input_scale"])
def test_a_fixed_scale_of_activations_is_dropped_with_the_weight_that_it_is_for(tmp_path, kind):
    family = stored(BLOCKS, experts=lambda *shape: tiles(*shape) | {kind: ("F32", ())})
    made = planned(tmp_path, family)
    fused = stacked(family.tensors()) | {f"model.layers.{layer}.mlp.experts.gate_up_proj_{kind}": ("F32", (2,)) for layer in range(2)}
    made_fused = planned(tmp_path, dataclasses.replace(family, tensors=lambda: fused))
    for plan in (made, made_fused):
        assert {entry["decision"] for name, entry in plan["tensors"].items() if name.endswith(kind)} == {"drop"}


def channels(rows, columns):
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("BF16", (rows, 1))}


def compressed(strategy, inputs=None, **more):
    """A group of compressed-tensors for FP8."""
    return {"weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False} | more, "input_activations": inputs}


DYNAMIC = {"num_bits": 8, "type": "float", "dynamic": True}


@pytest.mark.parametrize(("store", "groups", "stored_as", "noted"), [
    (channels, [compressed("channel")], "fp8 per channel, weight-only", False), (channels, [compressed("channel", DYNAMIC)], "fp8 per channel", False),
    (channels, [compressed("channel"), compressed("channel", DYNAMIC)], "fp8 per channel", True),
    (lambda *shape: channels(*shape) | {"weight_scale": ("F32", (1,))}, [compressed("tensor")], "fp8 per tensor, weight-only", False),
    (partial(tiles, scale="weight_scale"), [compressed("block", block_structure=[128, 128])], "fp8 128x128", True),
])
def test_fp8_whose_activations_the_source_leaves_alone_stays_so_where_vllm_reads_it(tmp_path, store, groups, stored_as, noted):
    section = {"quant_method": "compressed-tensors", "config_groups": dict(enumerate(groups))}
    made = planned(tmp_path, stored(section, attention=store))
    assert {entry["stored"] for name, entry in made["tensors"].items() if "_proj." in name and "experts" not in name} == {stored_as}
    (group,) = (group for group in made["quantization_config"]["config_groups"].values() if group["format"] == kept.FORMAT)
    assert (group["input_activations"] is None) == stored_as.endswith(kept.WEIGHT_ONLY) and kept.stored_by(group) == stored_as
    assert any("get their activations quantized" in note for note in made["notes"]) == noted


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_for_a_tensor_is_kept_in_a_shape_that_vllm_loads(tmp_path, shape, name):
    section = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    made = planned(tmp_path, stored(section, attention=lambda *size: {"weight": ("F8_E4M3", size), name: ("F32", shape)}))
    (output,) = outputs_of(f"{K_PROJ}.{name}", made["tensors"][f"{K_PROJ}.{name}"], "per_expert")
    assert (output.name, output.shape) == (f"{K_PROJ}.weight_scale", (1,) if shape else ())
    assert made["tensors"][f"{K_PROJ}.weight"]["stored"] == "fp8 per tensor"


def test_a_head_in_fp8_blocks_which_vllm_does_not_load_is_refused(tmp_path):
    def with_head(section, store):
        family = stored(section, experts=store)
        head = {f"lm_head.{part}": entry for part, entry in store(512, 256).items()}
        return dataclasses.replace(family, tensors=lambda: family.tensors() | head)

    assert planned(tmp_path / "channels", with_head(COMPRESSED, channels))["tensors"]["lm_head.weight"]["stored"] == "fp8 per channel"
    with pytest.raises(UserError, match="lm_head: stored as fp8 128x128, but vLLM loads a head with scales per channel, per tensor"):
        planned(tmp_path / "blocks", with_head(BLOCKS, tiles))


def per_block(size):
    return {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": size}}


def test_blocks_of_quark_are_read_and_kept_beside_its_mxfp4(tmp_path):
    section = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
               "layer_quant_config": {"*self_attn*": per_block([128, 128])}}
    made = planned(tmp_path, stored(section, experts=mxfp4, attention=partial(tiles, scale="weight_scale")))
    assert {entry["stored"] for name, entry in made["tensors"].items() if K_PROJ in name} == {"fp8 128x128"}
    section["layer_quant_config"]["*mlp*"] = per_block([64, 128])
    with pytest.raises(UserError, match=r"blocks of several sizes, \[128, 128\], \[64, 128\], .*; get the checkpoint in BF16"):
        planned(tmp_path, stored(section, experts=mxfp4, attention=partial(tiles, scale="weight_scale")))


def test_blocks_that_quark_declares_for_all_layers_are_converted(tmp_path):
    section = {"quant_method": "quark", "global_quant_config": per_block([128, 128])}
    made = planned(tmp_path, stored(section, experts=partial(tiles, scale="weight_scale")))
    assert made["tensors"][f"{EXPERT}.weight"]["dialect"] == "block_fp8"


def nvfp4(rows, columns):
    return {"weight": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)), "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ())}


@pytest.mark.parametrize("section", [{"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, {"quant_method": "modelopt_mixed"},
                                     BLOCKS | {"moe_quant_algo": "NVFP4"}])
def test_blocks_of_fp8_beside_nvfp4_experts_are_kept(tmp_path, section):
    made = planned(tmp_path, stored(section, experts=nvfp4, attention=tiles))
    assert {entry["stored"] for entry in made["tensors"].values() if entry["stored"]} == {"mxfp4", "fp8 128x128"}


@pytest.mark.parametrize(("section", "stores", "words"), [
    (BLOCKS, {"experts": nvfp4, "attention": tiles}, "is NVFP4, but config.json declares .*'fp8' without moe_quant_algo .* this mix is not supported"),
    ({"quant_method": "mxfp4"}, {"experts": mxfp4, "attention": tiles}, "'mxfp4', but .* 8 block-FP8 weights, .* this mix is not supported"),
    (None, {"experts": mxfp4}, "quant_method None, .*; restore the original config.json"),
    ({"quant_method": "w4afp8"}, {"experts": tiles}, "'w4afp8' is not read here"),
])
def test_a_mix_that_config_json_does_not_have_is_refused_as_what_it_is(tmp_path, section, stores, words):
    with pytest.raises(UserError, match=words):
        planned(tmp_path, stored(section, **stores))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor_in_the_spelling_of_transformers_is_read(tmp_path, shape):
    section = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    made = planned(tmp_path, stored(section, experts=lambda *size: {
        "weight": ("F8_E4M3", size), "weight_scale_inv": ("BF16", shape), "activation_scale": ("BF16", ())}))
    entry = made["tensors"][f"{EXPERT}.weight"]
    assert (entry["dialect"], entry["one_scale"], entry["parts"]) == ("channel_fp8", True, {"activation_scale": f"{EXPERT}.activation_scale"})
    with pytest.raises(UserError, match=r"weight_scale_inv has shape \[128, 1\], but tiles of \[128, 128\]"):
        planned(tmp_path, stored(section, experts=lambda *size: {"weight": ("F8_E4M3", size), "weight_scale_inv": ("BF16", (size[0], 1))}))


def mxfp8(rows, columns):
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("U8", (rows, columns // 32))}


def int4(rows, columns):
    return {"weight_packed": ("I32", (rows, columns // 8)), "weight_scale": ("BF16", (rows, columns // 32)), "weight_shape": ("I64", (2,))}


COMPRESSED = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(("store", "section"), [(mxfp4, {"quant_method": "quark"}), (mxfp8, COMPRESSED), (int4, COMPRESSED)])
def test_a_fixed_scale_of_activations_beside_any_weight_is_dropped_with_it(tmp_path, store, section):
    made = planned(tmp_path, stored(section, experts=lambda *shape: store(*shape) | {"input_scale": ("F32", ())}))
    assert made["tensors"][f"{EXPERT}.input_scale"]["decision"] == "drop"
    alone = {f"{EXPERT.replace('.0.', '.7.')}.input_scale": ("F32", ())}
    with pytest.raises(UserError, match=r"scale .*experts\.7\.down_proj\.input_scale has no weight .*experts\.7\.down_proj\.weight in any shard"):
        planned(tmp_path, stored(section, alone, experts=store))


def e8m0(store, *shape, **others):
    """As stored by `store`, its scale another dtype."""
    return {part: (others.get("dtype", "F8_E8M0"), size) if "scale" in part else (dtype, size) for part, (dtype, size) in store(*shape).items()}


@pytest.mark.parametrize(("store", "section", "dialect"), [
    (partial(e8m0, mxfp8), COMPRESSED, "mxfp8"), (partial(e8m0, mxfp4), {"quant_method": "quark"}, "mxfp4"),
    (lambda *shape: {part.replace("scale", "scale_inv"): entry for part, entry in e8m0(mxfp8, *shape).items()},
     {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "mxfp8"),
    (partial(e8m0, tiles, dtype="U8"), BLOCKS, "block_fp8"), (partial(e8m0, tiles), BLOCKS, "block_fp8"),
    (partial(e8m0, tiles, dtype="U8"), {"quant_method": "quark", "global_quant_config": per_block([128, 128])}, "block_fp8"),
])
def test_e8m0_scales_are_known_under_both_dtypes(tmp_path, store, section, dialect):
    made = planned(tmp_path, stored(section, experts=store))
    assert made["tensors"][f"{EXPERT}.weight"]["dialect"] == dialect


def test_e8m0_scales_of_another_dtype_are_kept_as_the_bytes_that_vllm_loads(tmp_path):
    made = planned(tmp_path, stored(COMPRESSED, attention=partial(e8m0, mxfp8)))
    name = f"{K_PROJ}.weight_scale"
    assert made["tensors"][name]["stored"] == "mxfp8" and outputs_of(name, made["tensors"][name], "per_expert")[0].dtype == "U8"


@pytest.mark.parametrize(("store", "section", "words"), [
    (lambda *shape: {"weight": ("F8_E4M3", shape), "weight_scale": ("I16", (1,))}, COMPRESSED, r"weight_scale is I16 \[1\], which together"),
    (lambda *shape: {"weight_packed": ("U8", (shape[0], shape[1] // 2)), "weight_scale": ("BF16", (shape[0], 4))}, COMPRESSED,
     r"weight_packed is U8 .* and .*weight_scale is BF16 .*, which together"),
    (lambda *shape: int4(*shape) | {"weight_scale": ("I32", (shape[0], 4))}, COMPRESSED, r"weight_scale is I32 \[\d+, 4\], which together"),
])
def test_a_scale_that_is_there_in_another_form_is_not_called_missing(tmp_path, store, section, words):
    with pytest.raises(UserError, match=f"{words}.*; get the checkpoint in BF16 or FP8"):
        planned(tmp_path, stored(section, experts=store))


@pytest.mark.parametrize(("config", "tensors"), [
    ({"architectures": ["LongcatFlashForCausalLM"], "num_hidden_layers": None, "num_layers": 2}, {}),
    ({"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "num_hidden_layers": None, "thinker_config": {}}, {}),
    ({"architectures": ["Llama4ForConditionalGeneration"], "quantization_config": {"quant_method": "fbgemm_fp8"}},
     {"model.layers.0.feed_forward.experts.gate_up_proj": ("F8_E4M3", (2, 256, 256)),
      "model.layers.0.feed_forward.experts.gate_up_proj_scale": ("F32", (2, 1, 256))}),
    ({"architectures": ["MistralLarge3ForCausalLM"]}, {"layers.0.attention.wq.weight": ("F8_E4M3", (256, 256)),
                                                      "layers.0.attention.wq.qscale_weight": ("F32", ())}),
    ({"architectures": ["GptOssForCausalLM"]}, {f"{EXPERT}.scales": ("U8", (2,))}),
])
def test_an_architecture_that_is_not_converted_is_told_before_what_is_odd_about_its_tensors(tmp_path, config, tensors):
    with pytest.raises(UserError, match=f"{config['architectures'][0]}.* (are not known|is not converted)"):
        planned(tmp_path, stored(None, tensors, config))


def test_a_section_under_its_older_name_is_read_and_not_left_in_the_release(tmp_path):
    config = CONFIG | {"compression_config": COMPRESSED | {"format": "float-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_source_config(tmp_path)
    assert declared(read)["format"] == "float-quantized" and "compression_config" not in release_config(read, {})
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert declared(read_source_config(tmp_path))["format"] == "float-quantized"
    assert "dialect" in planned(tmp_path, stored(None, config=config, experts=channels))["tensors"][f"{EXPERT}.weight"]


CACHE_SCALES = {f"model.layers.0.self_attn.{part}_proj.{part}_scale": ("F32", ()) for part in "kv"}  # of one layer only


@pytest.mark.parametrize(("section", "config", "stores"), [
    (COMPRESSED | {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, {}, {}),
    (COMPRESSED | {"config_groups": {"a": compressed("block", DYNAMIC, block_structure="128x128")}}, {},
     {"attention": partial(tiles, scale="weight_scale")}),
    (None, {"num_local_experts": 0}, {}), (BLOCKS, {"n_routed_experts": 0}, {"experts": tiles}),
])
def test_what_a_config_says_that_harms_nothing_is_accepted(tmp_path, section, config, stores):
    made = planned(tmp_path, stored(section, CACHE_SCALES, config, **stores))
    assert {made["tensors"][name]["decision"] for name in CACHE_SCALES} == {"pass through"}


@pytest.mark.parametrize(("section", "config", "words"), [
    (COMPRESSED | {"config_groups": {}}, {}, "no tensor is stored"), (None, {"num_experts": 0}, "num_experts is 0"),
    (COMPRESSED | {"config_groups": {"a": compressed("block", block_structure="128 by 128")}}, {}, "the block size is '128 by 128'"),
    ({"quant_method": ["fp8"]}, {}, r"quantization_config: quant_method is \['fp8'\], expected a word"),
    (COMPRESSED | {"config_groups": {"a": compressed({"name": "block"})}}, {}, "a.weights: strategy is {'name': 'block'}, expected a word"),
    (COMPRESSED | {"config_groups": {"a": compressed("block") | {"weights": {"symmetric": []}}}}, {}, r"a.weights: symmetric is \[\], expected a word"),
])
def test_what_it_says_that_cannot_be_is_refused_still(tmp_path, section, config, words):
    with pytest.raises(UserError, match=words):
        planned(tmp_path, stored(section, {}, config, **({"attention": partial(tiles, scale="weight_scale")} if section and section.get("config_groups") else {})))
