"""Plans for the published checkpoints of other families: real names, shapes, dtypes and configs, no weights."""

import dataclasses
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import mxfp4
from stages import checkup, command_line, evaluate, inspect_format, plan, report, serve_bench, validate_gemm
from stages.checkpoint.header import DTYPE_BYTES
from stages.checkup.source import Source
from stages.conversion import quantizer
from stages.dialects import reading
from stages.dialects.config import EXPERT_COUNTS
from stages.dialects.reading import decoded
from stages.errors import UserError
from stages.planning.record import read_plan
from stages.schemes import vllm_rules
from stages.schemes.architectures import ARCHITECTURES, TRANSFORMERS, architecture_of
from stages.schemes.engines import engines
from stages.settings import load
from tests import small_models
from tests.conftest import convert
from tests.meta_checkpoints import FAMILIES, VARIANTS
from tests.small_models import expanded, save
from tests.step37_flash import empty_listing

EXPERT = re.compile(r".*layers\.(?P<layer>\d+)\..*\.experts\.(?:\d+\.)?\w+")
PUBLISHED = {  # bytes of all tensors, as the published headers have them
    "deepseek_v3": 688_574_839_360, "qwen3_moe_fp8": 31_170_895_872, "qwen35_moe_bf16": 71_903_655_008, "minimax_m2": 230_121_630_720,
    "minimax_m3": 443_742_085_120, "kimi_k2": 1_029_173_256_720, "kimi_k2_thinking": 594_205_920_512, "qwen3_dense": 16_381_470_720,
    "deepseek_v2": 2 * 235_741_434_880, "gpt_oss_120b": 65_248_815_744,
    "qwen3_vl_moe": 2 * 235_670_022_896, "qwen3_vl_moe_30b": 2 * 31_070_754_032,  # their parameters, in BF16
}


def planned(tmp_path, family, recipe="mxfp4_experts", drop=()):
    """The plan of a header-only checkpoint in one shard."""
    settings = load([f"results={tmp_path}", "source=local", "source.path=/nowhere", "source.name=family", f"recipe={recipe}"])
    table, position = {}, 0
    for name, (dtype, shape) in family.tensors().items():
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        table[name], position = [dtype, list(shape), position, position + size], position + size
    for name in drop:
        del table[name]
    headers = {"model.safetensors": {"file_size": position, "metadata": None, "data_start": 0, "tensors": table}}
    for path, content in (("headers.json", headers), ("listing.json", empty_listing(settings.source)), ("auxiliary/config.json", family.config)):
        (settings.source_directory / path).parent.mkdir(parents=True, exist_ok=True)
        (settings.source_directory / path).write_text(json.dumps(content))
    return plan.make_plan(settings, inspect_format.census(settings), family.config)


def few_experts(family):
    """The same checkpoint with its first eight experts where they are stored one by one: a tenth of the names, every kind of them."""
    def tensors():
        return {name: entry for name, entry in family.tensors().items()
                if not (match := re.search(r"\.experts\.(\d+)\.", name)) or int(match[1]) < 8}

    if not any(re.search(r"layers\.\d+\..*\.experts\.\d+\.", name) for name in family.tensors() if not name.startswith("mtp.")):
        return family
    config = json.loads(json.dumps(family.config))
    text = config.get("text_config") or config
    text |= {key: 8 for key in EXPERT_COUNTS if key in text}
    return dataclasses.replace(family, tensors=tensors, config=config)


def test_without_a_count_in_the_config_a_missing_last_expert_is_still_noticed(tmp_path):
    family = few_experts(FAMILIES["qwen3_moe_fp8"])
    config = {key: value for key, value in family.config.items() if key not in EXPERT_COUNTS}
    gone = [name for name in family.tensors() if ".layers.1.mlp.experts.7." in name]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts.*is missing"):
        planned(tmp_path, dataclasses.replace(family, config=config), drop=gone)


def test_the_stacked_layout_of_experts_that_are_stored_one_by_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="has none"):
        planned(tmp_path, few_experts(FAMILIES["qwen3_moe_fp8"]), recipe="mxfp4_experts_stacked")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tensors_of_a_family_have_the_published_bytes(name):
    assert (FAMILIES | VARIANTS)[name].total_size == PUBLISHED[name]


@pytest.mark.parametrize(("name", "formats"), [
    ("deepseek_v3", {"mxfp4-pack-quantized", "float-quantized"}), ("qwen3_moe_fp8", {"mxfp4-pack-quantized", "float-quantized"}),
    ("qwen35_moe_bf16", {"mxfp4-pack-quantized"}), ("glm46_fp8", {"mxfp4-pack-quantized", "float-quantized"}),
    ("minimax_m2", {"mxfp4-pack-quantized", "float-quantized"}), ("minimax_m3", {"mxfp4-pack-quantized", "mxfp8-quantized"}),
    ("kimi_k2", {"mxfp4-pack-quantized", "float-quantized"}), ("kimi_k2_thinking", {"mxfp4-pack-quantized"}),
    ("qwen3_vl_moe", {"mxfp4-pack-quantized"}), ("qwen3_vl_moe_fp8", {"mxfp4-pack-quantized", "float-quantized"}),
    ("qwen3_next", {"mxfp4-pack-quantized"}), ("ling_mini", {"mxfp4-pack-quantized"}), ("glm45v", {"mxfp4-pack-quantized"}),
    ("k_exaone", {"mxfp4-pack-quantized"}), ("trinity_large", {"mxfp4-pack-quantized"}),
    ("hy3", {"mxfp4-pack-quantized"}), ("deepseek_v2", {"mxfp4-pack-quantized"}), ("qwen35_moe_text", {"mxfp4-pack-quantized"}),
    ("intern_s1", {"mxfp4-pack-quantized"}), ("dots1", {"mxfp4-pack-quantized"}),
])
def test_a_family_is_planned_with_its_experts_in_mxfp4_and_the_rest_as_it_was(tmp_path, name, formats):
    family = few_experts(FAMILIES[name])
    made = planned(tmp_path, family)
    layers = (family.config.get("text_config") or family.config)["num_hidden_layers"]
    routed = {tensor: entry for tensor, entry in family.tensors().items()
              if (match := EXPERT.match(tensor)) and int(match["layer"]) < layers and not tensor.startswith("mtp.")}
    packed = 8 if name == "kimi_k2_thinking" else 1
    weights = sum(packed * math.prod(shape) for tensor, (_, shape) in routed.items() if not re.search(r"scale|shape", tensor))
    rest = family.total_size - sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in routed.values())
    assert made["quantized_weights"] == weights
    assert made["release_tensor_bytes"] == rest + weights * 17 // 32
    assert {group["format"] for group in made["quantization_config"]["config_groups"].values()} == formats
    assert {entry["decision"] for tensor, entry in made["tensors"].items() if tensor not in routed} <= {"keep", "pass through"}
    assert any(row["fits"] for row in made["tensor_parallel"] if row["tensor_parallel"] == 4)


def test_what_vllm_asks_for_by_other_names_than_the_checkpoints_is_targeted(tmp_path):
    targets = {}
    for name in ("minimax_m2", "deepseek_v3"):
        made = planned(tmp_path / name, few_experts(FAMILIES[name]))
        targets[name] = [target for group in made["quantization_config"]["config_groups"].values() for target in group["targets"]]
    assert r"re:.*model\.layers\.\d+\.mlp\.experts\.\d+\.(w1|w2|w3)$" in targets["minimax_m2"]  # stored as block_sparse_moe
    assert any("fused_qkv_a_proj" in target for target in targets["deepseek_v3"])


def test_draft_experts_stay_fp8_beside_mxfp4_experts_of_the_same_name(tmp_path):
    made = planned(tmp_path, few_experts(FAMILIES["deepseek_v3"]))
    name = "model.layers.61.mlp.experts.3.up_proj.weight"
    assert made["tensors"][name]["decision"] == "keep" and made["tensors"][name]["stored"] == "fp8 128x128"
    groups = {group["format"]: group["targets"] for group in made["quantization_config"]["config_groups"].values()}
    matching = [form for form, targets in groups.items() for target in targets if re.match(target[3:], name.removesuffix(".weight"))]
    assert matching == ["float-quantized"]


def test_an_indexer_in_fp8_is_left_to_the_loader_that_decodes_it(tmp_path):
    """DeepSeek-V3.2: vLLM never reads indexer.wk quantized, its loader decodes it; wq_b beside it is an ordinary FP8 linear."""
    family = few_experts(FAMILIES["deepseek_v3"])
    indexer = {"wk": (128, 7168), "wq_b": (8192, 1536)}

    def tensors():
        found = dict(family.tensors())
        for layer in range(61):
            for name, (rows, columns) in indexer.items():
                prefix = f"model.layers.{layer}.self_attn.indexer.{name}.weight"
                found |= {prefix: ("F8_E4M3", (rows, columns)), f"{prefix}_scale_inv": ("F32", (rows // 128, columns // 128))}
            found[f"model.layers.{layer}.self_attn.indexer.weights_proj.weight"] = ("BF16", (64, 7168))
        return found

    config = {**family.config, "architectures": ["DeepseekV32ForCausalLM"]}
    made = planned(tmp_path, dataclasses.replace(family, tensors=tensors, config=config))
    targets = [target for group in made["quantization_config"]["config_groups"].values() for target in group["targets"]]
    assert made["tensors"]["model.layers.7.self_attn.indexer.wk.weight"]["decision"] == "keep"
    assert any("wq_b" in target for target in targets) and not any("wk" in target for target in targets)


@pytest.mark.parametrize(("name", "recipe", "words"), [
    ("gpt_oss", "mxfp4_experts", ["GptOssForCausalLM is not converted", "MXFP4 layout only", "is served as it is"]),
    ("qwen3_dense", "mxfp4_experts", ["'routed_experts' matches no weight", "dense_mlp"]),
])
def test_a_family_that_cannot_become_a_release_that_loads_is_refused(tmp_path, name, recipe, words):
    with pytest.raises(UserError) as caught:
        planned(tmp_path, FAMILIES[name], recipe)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_draft_layers_that_vllm_would_stop_at_are_refused(tmp_path):
    family = few_experts(FAMILIES["ling_mini"])
    tensors = family.tensors()
    tensors |= {name.replace(".layers.19.", ".layers.20."): entry for name, entry in tensors.items() if ".layers.19." in name}
    drafting = dataclasses.replace(family, tensors=lambda: tensors, config={**family.config, "num_nextn_predict_layers": 1})
    with pytest.raises(UserError, match=r"model\.layers\.20\..* belongs to a draft layer.*take the layers .* num_nextn_predict_layers"):
        planned(tmp_path, drafting)


@pytest.mark.parametrize(("name", "pattern", "other"), [
    ("qwen35_moe_text", r"^model\.", "model.language_model."),
    ("intern_s1", r"^model\.language_model\.", "language_model.model."), ("intern_s1", r"^model\.(?=vision_tower|multi_modal)", ""),
])
def test_a_family_that_is_published_under_two_prefixes_is_planned_under_both(tmp_path, name, pattern, other):
    family = few_experts(FAMILIES[name])
    renamed = dataclasses.replace(family, tensors=lambda: {re.sub(pattern, other, tensor): entry for tensor, entry in family.tensors().items()})
    assert list(renamed.tensors()) != list(family.tensors())
    made = [planned(tmp_path / kind, model, "mxfp4_experts_mxfp8_rest") for kind, model in (("as it is", family), ("renamed", renamed))]
    assert made[0]["runtime_modules"] == made[1]["runtime_modules"]
    assert made[0]["quantization_config"] == made[1]["quantization_config"]


@pytest.mark.parametrize("text", ["gpt_oss", "qwen2", None])
def test_an_architecture_around_another_text_model_than_it_is_known_with_is_refused(tmp_path, text):
    """InternVL3.5 is also published around gpt-oss, whose experts no release would hold as vLLM reads them."""
    family = few_experts(FAMILIES["intern_s1"])
    config = {**family.config, "architectures": ["InternVLForConditionalGeneration"]}
    planned(tmp_path, dataclasses.replace(family, config=config))
    other = config | {"text_config": {**config["text_config"], "model_type": text}}
    with pytest.raises(UserError, match=f"InternVLForConditionalGeneration is known around .* qwen3_moe only, this one's text_config says {text}"):
        planned(tmp_path, dataclasses.replace(family, config=other))


@pytest.mark.parametrize("gone", ["model.vision_tower.encoder.layer.44", "model.vision_tower.encoder.layer.7.mlp.fc1.weight"])
def test_a_part_of_a_tower_whose_blocks_are_called_layer_is_missed(tmp_path, gone):
    family = few_experts(FAMILIES["intern_s1"])
    with pytest.raises(UserError, match=f"no shard holds the {re.escape(gone)};"):
        planned(tmp_path, family, drop=[name for name in family.tensors() if name.startswith(gone)])


@pytest.mark.parametrize(("name", "prefix", "other"), [
    ("qwen35_moe_bf16", "model.language_model.", "model."), ("qwen3_moe_fp8", "model.", "model.language_model."),
    ("qwen3_moe_fp8", "model.", "language_model.model."), ("minimax_m3", "language_model.model.", "model."),
])
def test_names_that_are_those_of_another_architecture_are_refused(tmp_path, name, prefix, other):
    family = few_experts(FAMILIES[name])
    tensors = {re.sub(f"^{re.escape(prefix)}", other, tensor): entry for tensor, entry in family.tensors().items()}
    with pytest.raises(UserError, match=rf"{re.escape(other)}layers\.0\..* to vLLM, which has the layers of \w+ as .* stops at others"):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: tensors))


def test_mimo_whose_attention_no_engine_reads_as_it_is_stored_becomes_mxfp8(tmp_path):
    family = few_experts(FAMILIES["mimo_v2_flash"])
    made = planned(tmp_path, family, "mxfp4_experts_mxfp8_rest")
    assert {(entry["role"], entry["stored"]) for entry in made["tensors"].values() if entry["stored"]} == {
        ("routed_experts", "mxfp4"), ("attention", "mxfp8"), ("dense_mlp", "mxfp8"), ("mtp", "fp8 128x128")}
    k, v = (f"model.layers.5.self_attn.{part}_proj.weight" for part in "kv")
    assert made["tensors"][v]["tile"] == [64, 128]
    assert made["tensors"][v]["scales"][:4] == [[f"{k}_scale_inv", 1], [f"{v}_scale_inv", 0], [f"{k}_scale_inv", 3], [f"{v}_scale_inv", 1]]
    with pytest.raises(UserError, match=r"k_proj\.weight is block_fp8 and .* merged on each of several GPUs.*name its role \(attention\)"):
        planned(tmp_path, family)
    with pytest.raises(UserError, match=r"layer 7: there is no self_attn\.attention_sink_bias"):
        planned(tmp_path, family, "mxfp4_experts_mxfp8_rest", drop=["model.layers.7.self_attn.attention_sink_bias"])
    plain = {name: ("BF16", shape) for name, (_, shape) in family.tensors().items() if not name.endswith("_scale_inv")}
    later = {**family.config, "architectures": ["MiMoV2ForCausalLM"], "quantization_config": None}
    with pytest.raises(UserError, match="MiMoV2ForCausalLM is not converted: its qkv_proj is stored as the parts of several GPUs"):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: plain, config=later))


@pytest.mark.parametrize("name", ["k_exaone", "trinity_large", "hy3"])
def test_a_missing_router_bias_of_which_vllm_would_say_nothing_is_refused(tmp_path, name):
    family, bias = few_experts(FAMILIES[name]), architecture_of(FAMILIES[name].config["architectures"][0]).needed
    tensors = {tensor.replace(bias, "mlp.gate.e_score_correction_bias"): entry for tensor, entry in family.tensors().items()}
    with pytest.raises(UserError, match=rf"layer \d: there is no {re.escape(bias)}, by which vLLM routes"):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: tensors))


def test_an_architecture_whose_names_nobody_knows_is_refused(tmp_path):
    family = FAMILIES["qwen3_dense"]
    unknown = dataclasses.replace(family, config={**family.config, "architectures": ["NobodyKnowsForCausalLM"]})
    with pytest.raises(UserError, match="'NobodyKnowsForCausalLM' are not known.*Qwen3ForCausalLM"):
        planned(tmp_path, unknown, "mxfp4_all_linear")


def test_a_dense_model_becomes_mxfp4_in_all_its_linear_weights(tmp_path):
    made = planned(tmp_path, FAMILIES["qwen3_dense"], "mxfp4_all_linear")
    roles = {entry["role"] for entry in made["tensors"].values() if entry["decision"] == "quantize"}
    assert roles == {"attention", "dense_mlp"} and made["quantized_weights"] == 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288)


def test_everything_but_the_experts_becomes_mxfp8(tmp_path):
    made = planned(tmp_path, FAMILIES["qwen35_moe_bf16"], "mxfp4_experts_mxfp8_rest")
    stored = {entry["role"]: entry["stored"] for entry in made["tensors"].values() if entry["stored"]}
    assert stored == {"routed_experts": "mxfp4", "shared_experts": "mxfp8", "attention": "mxfp8", "linear_attention": "mxfp8"}


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.update({"model.language_model.layers.0.mlp.experts.gate_up_proj": ("BF16", (256, 2048, 1024))}), "stored transposed"),
    (lambda t: t.update({"model.language_model.layers.0.mlp.experts.gate_up_proj": ("BF16", (256, 1023, 2048))}), "cannot be told apart"),
])
def test_fused_experts_of_another_layout_are_refused(tmp_path, change, words):
    family = FAMILIES["qwen35_moe_bf16"]
    tensors = family.tensors()
    change(tensors)
    with pytest.raises(UserError, match=words):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: tensors))


def stacked(change):
    """What changes the shape of Qwen3-VL's stacked experts of layer 3, [experts, in, out] as published."""
    prefix = "model.language_model.layers.3.mlp.experts."

    def changed(tensors, text):
        for name in ("gate_up_proj", "down_proj"):
            dtype, shape = tensors[prefix + name]
            tensors[prefix + name] = (dtype, change(name, *shape))
    return changed


@pytest.mark.parametrize(("change", "words"), [
    (stacked(lambda name, experts, *matrix: (experts, *matrix[::-1])), r"layers\.3\.mlp\.experts\.\w+ is BF16 .* or all of them transposed; one"),
    (stacked(lambda name, experts, inputs, outputs: (experts, inputs, outputs // 2)),
     r"is BF16 \[128, \d+, \d+\]; by config.json stacked experts are gate_up_proj \[128, 3072, 4096\] and down_proj \[128, 4096, 1536\], or"),
    (stacked(lambda name, experts, *matrix: (experts - 1, *matrix)), r"is BF16 \[127, "),
    (lambda tensors, text: text.pop("moe_intermediate_size"), "moe_intermediate_size is missing, .* which way"),
    (lambda tensors, text: tensors.update({f"{name[:-9]}gate_proj": tensors.pop(name) for name in list(tensors) if name.endswith(".down_proj")}),
     r"experts\.gate_proj is BF16 \[128, 1536, 4096\]; by config"),
])
def test_stacked_experts_that_lie_neither_way_are_refused(tmp_path, change, words):
    family = FAMILIES["qwen3_vl_moe"]
    tensors, config = family.tensors(), json.loads(json.dumps(family.config))
    change(tensors, config["text_config"])
    with pytest.raises(UserError, match=words):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: tensors, config=config))


def test_a_dialect_that_nobody_stores_transposed_is_refused(tmp_path):
    family, tensors = FAMILIES["qwen3_vl_moe"], {}
    for name, (dtype, shape) in family.tensors().items():
        tensors[name] = ("F8_E4M3" if len(shape) == 3 else dtype, shape)
        if len(shape) == 3:
            tensors[f"{name}_scale_inv"] = ("U8", (*shape[:2], shape[2] // 32))
    config = family.config | {"quantization_config": {"quant_method": "mxfp8"}}
    with pytest.raises(UserError, match=r"is mxfp8 and stored transposed, .* of plain and block_fp8 only"):
        planned(tmp_path, dataclasses.replace(family, tensors=lambda: tensors, config=config))


def test_the_stacked_layout_of_fused_experts_is_refused(tmp_path):
    with pytest.raises(UserError, match="recipe.layout=per_expert"):
        planned(tmp_path, FAMILIES["qwen35_moe_bf16"], "mxfp4_experts_stacked")


def test_a_scale_that_is_missing_among_thousands_of_tensors_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.layers\.17\.mlp\.experts\.5\.up_proj\.weight has no scale"):
        planned(tmp_path, few_experts(FAMILIES["deepseek_v3"]), drop=["model.layers.17.mlp.experts.5.up_proj.weight_scale_inv"])


def small_deepseek(directory):
    """DeepSeek-V3's names and dialect at a hundredth of its width: 1 dense layer, 2 of 4 experts, a draft layer; random FP8 weights."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, tensors = 256, 128, {}

    def put(name, *shape, fp8=True):
        weight = torch.randn(shape, generator=generator) * 0.05
        if len(shape) == 1 or not fp8:
            tensors[f"{name}.weight"] = weight.bfloat16()
            return
        scale = torch.rand([math.ceil(size / 128) for size in shape], generator=generator) * 1e-3 + 1e-4
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = (weight * 2000).to(torch.float8_e4m3fn), scale

    for layer in range(4):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (("q_a_proj", 128, hidden), ("q_b_proj", 4 * 96, 128), ("kv_a_proj_with_mqa", 96, hidden),
                                    ("kv_b_proj", 4 * 128, 64), ("o_proj", hidden, 4 * 64)):
            put(f"{prefix}self_attn.{name}", rows, columns)
        for norm, size in (("self_attn.q_a_layernorm", 128), ("self_attn.kv_a_layernorm", 64), ("input_layernorm", hidden),
                           ("post_attention_layernorm", hidden)):
            put(prefix + norm, size)
        for block, width in (("mlp", 512),) if layer == 0 else (("mlp.shared_experts", inner), *((f"mlp.experts.{e}", inner) for e in range(4))):
            for projection in ("gate", "up", "down"):
                put(f"{prefix}{block}.{projection}_proj", *((hidden, width) if projection == "down" else (width, hidden)))
        if layer:
            put(f"{prefix}mlp.gate", 4, hidden, fp8=False)
            tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.zeros(4)
        if layer == 3:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                put(prefix + name, hidden)
            for name, rows, columns in (("eh_proj", hidden, 2 * hidden), ("shared_head.head", 512, hidden), ("embed_tokens", 512, hidden)):
                put(prefix + name, rows, columns, fp8=False)
    for name in ("model.embed_tokens", "lm_head"):
        put(name, 512, hidden, fp8=False)
    put("model.norm", hidden)
    directory.mkdir()
    names = sorted(tensors)  # experts of a layer lie in two shards, some apart from their scales
    for number in (1, 2):
        save_file({name: tensors[name] for name in names[number - 1::2]}, directory / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
    config = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "hidden_size": hidden,
              "n_routed_experts": 4, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_small_deepseek_is_converted_proven_reported_and_configured_again(tmp_path, monkeypatch):
    source = tmp_path / "model"
    tensors = small_deepseek(source)
    settings = convert("source=local", f"source.path={source}", f"results={tmp_path / 'results'}", "serving=none")
    release = settings.run_directory / "release"
    made = {name: tensor for path in release.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert sum(name.endswith("weight_packed") for name in made) == 2 * 4 * 3
    for name, tensor in tensors.items():
        kept = name.replace("weight_scale_inv", "weight_scale")
        if ".mlp.experts." not in name or "layers.3." in name:
            assert made[kept].dtype == tensor.dtype and torch.equal(made[kept].view(torch.uint8), tensor.view(torch.uint8)), name
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    expected = mxfp4.quantize(tensors[name], tensors[f"{name}_scale_inv"], backend="reference")
    assert torch.equal(made[f"{name}_packed"], expected.packed) and torch.equal(made[f"{name}_scale"], expected.scale)
    result = checkup.check(release, source)
    assert result["passed"], result
    before = (release / "config.json").read_bytes()
    config = json.loads(before)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:model\.layers\.\d+\.mlp\.experts.*"]
    (release / "config.json").write_text(json.dumps(config))
    assert any("no target claims it" in fault for row in checkup.check(release, quick=True)["checks"] for fault in row["faults"])
    monkeypatch.setattr("sys.argv", ["mxforge", "config", str(release)])
    command_line.main()
    assert (release / "config.json").read_bytes() == before
    validate_gemm.run(settings)
    assert "does not run in process" in evaluate.run(settings)["not_measured"]
    serve_bench.run(settings)
    report.run(settings)
    card = (settings.run_directory / "card.md").read_text()
    assert "in MXFP4 (E2M1" in card and "DeepseekV3ForCausalLM does not run" in card


def test_what_has_nothing_to_merge_with_is_a_module_of_its_own(tmp_path):
    """Moonlight has no q_lora_rank: vLLM builds q_proj, which no other name would reach."""
    settings = convert("source=local", f"source.path={save('moonlight', tmp_path / 'model', fp8=True)}", f"results={tmp_path / 'results'}", "serving=none")
    config = json.loads((settings.run_directory / "release" / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    for module in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        assert vllm_rules.matched_target(f"model.layers.1.self_attn.{module}", [], "ColumnParallelLinear", targets), module
    assert not any("qkv_proj" in target for target in targets)


def qwen3_vl(directory, monkeypatch, fp8=False, inner=128, transposed=True):
    """A small Qwen3-VL and its tensors; stored as transformers 5 saves it where not `transposed`."""
    class_name, fields = small_models.FAMILIES["qwen3_vl_moe"]
    text = fields["text_config"] | {"moe_intermediate_size": inner}
    monkeypatch.setitem(small_models.FAMILIES, "qwen3_vl_moe", (class_name, fields | {"text_config": text}))
    if not transposed:
        monkeypatch.setattr(small_models, "transpose_experts", lambda tensors: None)
    save("qwen3_vl_moe", directory, fp8)
    return load_file(directory / "model.safetensors")


def stacked_values(tensors, name):
    """Stacked experts of a small model, [experts, in, out] as they are published, in float32."""
    values = tensors[name].float()
    scale = tensors.get(f"{name}_scale_inv")
    return values if scale is None else values * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)


@pytest.mark.parametrize("fp8", [False, True])
def test_transposed_experts_are_quantized_along_their_inputs_in_panels_of_any_size(tmp_path, monkeypatch, fp8):
    """A gate_up_proj of 256 x 256 fits both ways: down_proj says which."""
    source = tmp_path / "model"
    tensors = qwen3_vl(source, monkeypatch, fp8)
    assert tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 256, 256)
    made = {}
    for panel, slab in ((quantizer.PANEL_WEIGHTS, reading.SLAB_WEIGHTS), (40 * 256, 24 * 256)):
        monkeypatch.setattr(quantizer, "PANEL_WEIGHTS", panel)
        monkeypatch.setattr(reading, "SLAB_WEIGHTS", slab)
        settings = convert("source=local", f"source.path={source}", f"results={tmp_path / str(panel)}", "serving=none")
        made[panel] = (settings.run_directory / "release" / "model.safetensors").read_bytes()
        result = checkup.check(settings.run_directory / "release", source)
        assert result["passed"], result
    assert len(set(made.values())) == 1
    validate_gemm.run(settings)
    release = load_file(settings.run_directory / "release" / "model.safetensors")
    assert not any("experts.gate_up_proj" in name or "experts.down_proj" in name for name in release)
    for layer in range(3):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        inputs_first = {"down": stacked_values(tensors, f"{prefix}down_proj")}
        inputs_first["gate"], inputs_first["up"] = stacked_values(tensors, f"{prefix}gate_up_proj").split(128, dim=2)
        for projection, values in inputs_first.items():
            for expert in range(8):
                expected = mxfp4.quantize(values[expert].T.contiguous(), backend="reference")
                name = f"{prefix}{expert}.{projection}_proj.weight"
                assert torch.equal(release[f"{name}_packed"], expected.packed) and torch.equal(release[f"{name}_scale"], expected.scale), name


def test_experts_as_transformers_saves_them_become_the_same_release(tmp_path, monkeypatch):
    releases = []
    for transposed in (True, False):
        source, results = tmp_path / f"model_{transposed}", tmp_path / f"results_{transposed}"
        tensors = qwen3_vl(source, monkeypatch, transposed=transposed)
        assert tensors["model.language_model.layers.1.mlp.experts.down_proj"].shape == ((8, 128, 256) if transposed else (8, 256, 128))
        settings = convert("source=local", f"source.path={source}", f"results={results}", "serving=none")
        releases.append((settings.run_directory / "release" / "model.safetensors").read_bytes())
    assert releases[0] == releases[1]


def test_transposed_experts_mean_what_transformers_reads(tmp_path, monkeypatch):
    from transformers import Qwen3VLMoeForConditionalGeneration

    qwen3_vl(tmp_path / "model", monkeypatch, inner=64)  # no matrix is square, which transformers would leave as it is
    theirs = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).state_dict()
    with Source(tmp_path / "model") as source:
        source.read(tmp_path)
        ours = {name: decoded(source.places, name, claim) for name, claim in source.claims.items() if claim.transposed}
    assert len(ours) == 6 and all(torch.equal(values, theirs[name].float()) for name, values in ours.items())


@pytest.mark.parametrize(("tensor", "place", "value"), [
    ("gate_up_proj", (3, 17, 200), float("nan")), ("down_proj_scale_inv", (2, 0, 1), -1.0)])
def test_nan_and_bad_scales_of_transposed_experts_are_named_by_their_stored_index(tmp_path, monkeypatch, tensor, place, value):
    tensors = qwen3_vl(tmp_path / "model", monkeypatch, fp8="scale" in tensor)
    name = f"model.language_model.layers.1.mlp.experts.{tensor}"
    tensors[name][place] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(f"{name}{list(place)} is")):
        convert("source=local", f"source.path={tmp_path / 'model'}", f"results={tmp_path / 'results'}", "serving=none")


def test_layers_that_share_an_indexer_have_none_and_others_must_have_theirs(tmp_path):
    """GLM-5.2: by indexer_types, 57 of 78 layers use that of a layer before them."""
    source = tmp_path / "model"
    small_deepseek(source)
    path, config = source / "model-00001-of-00002.safetensors", json.loads((source / "config.json").read_text())
    tensors = load_file(path)
    for layer in (0, 2):
        tensors[f"model.layers.{layer}.self_attn.indexer.k_norm.weight"] = torch.ones(128, dtype=torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    for keys in ({"indexer_types": ["full", "shared", "full"]}, {"index_topk_pattern": "FSF"}, {"index_topk_freq": 2, "index_skip_topk_offset": 1}):
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["GlmMoeDsaForCausalLM"]} | keys))
        settings = convert("source=local", f"source.path={source}", f"results={tmp_path / next(iter(keys))}", "serving=none")
        result = checkup.check(settings.run_directory / "release", quick=True)
        assert result["passed"], result
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="layer 1: there is no self_attn.indexer.k_norm.weight"):
        convert("source=local", f"source.path={source}", f"results={tmp_path / 'none'}", "serving=none")


IN_TRANSFORMERS = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
                   "minimax_m2": "MiniMaxM2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


def test_every_family_that_is_said_to_load_in_transformers_has_a_case_here():
    said = {row.names[0]: entry.forms for row in ARCHITECTURES for entry in row.tried if entry.engine == TRANSFORMERS and entry.loads == "yes"}
    assert said == dict.fromkeys(IN_TRANSFORMERS.values(), ("experts mxfp4",))


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_transformers_loads_a_release_and_says_what_its_values_say_in_bf16(tmp_path, family):
    from transformers import AutoModelForCausalLM

    settings = convert("source=local", f"source.path={save(family, tmp_path / family)}", f"results={tmp_path / 'results'}", "serving=none")
    release = settings.run_directory / "release"
    said = {row["engine"]: row["loads"] for row in read_plan(settings)["engines"]}
    assert said[TRANSFORMERS] == "yes"
    tokens = torch.randint(16, 512, (1, 64), generator=torch.Generator().manual_seed(1))
    logits = []
    for directory in (release, expanded(release, tmp_path / "bf16")):
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert all(".layers.3." in key for key in report["unexpected_keys"])  # the draft layer, which transformers does not build
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits) and logits[0].std() > 0.5


def test_what_was_run_is_said_of_that_architecture_and_form_only():
    def loads(architecture, **others):
        tensors = {"a": {"role": "routed_experts", "matrix": [64, 32], "stored": "mxfp4"}} | others
        made = {"architecture": architecture, "layout": "per_expert", "runtime_modules": 1, "tensors": tensors}
        return {row["engine"]: row["loads"] for row in engines(made)}[TRANSFORMERS]

    assert loads("DeepseekV3ForCausalLM") == "yes" and loads("GlmMoeDsaForCausalLM") == "unknown"
    for role, stored in (("vision", "mxfp8"), ("attention", "mxfp8"), ("routed_experts", "plain"), ("routed_experts", None)):
        assert loads("DeepseekV3ForCausalLM", b={"role": role, "matrix": [64, 32], "stored": stored}) == "unknown"
    assert loads("DeepseekV3ForCausalLM", b={"role": "attention", "matrix": [64, 32], "stored": "plain"}) == "yes"
