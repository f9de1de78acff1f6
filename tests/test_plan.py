"""The plan: decisions, predictions to the byte, and refusals before a byte is converted."""

import json
import math
import shutil

import pytest

from stages import inspect_format, plan
from stages.errors import UserError
from stages.planning.modules import coverage
from stages.schemes import tensor_parallel
from stages.settings import choices, load
from stages.sources import shards_of
from tests import step37_flash


@pytest.fixture(autouse=True)
def large_disk(monkeypatch):
    """Plans check the disk; these are about checkpoints of 400 GB."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))


def planned(tmp_path, *overrides, fp8=True):
    settings = load([f"results={tmp_path}", *overrides])
    step37_flash.write_metadata(settings, fp8)
    census = inspect_format.run(settings)
    return settings, census, plan.run(settings)


def test_the_real_fp8_release_is_predicted_to_the_byte(tmp_path):
    settings, census, made = planned(tmp_path, "source=step37_fp8")
    assert set(census["shards"]) == set(shards_of(settings.source)) and len(census["shards"]) == 26
    assert len(census["tensors"]) == 1597
    assert census["tensor_bytes"] == 212_523_475_712
    assert census["file_bytes"] == 212_523_666_872  # the published sizes of all 26 files
    assert made["quantized_weights"] == 190_253_629_440
    assert made["release_tensor_bytes"] == 123_295_638_272
    assert made["release_tensors"] == 73_921
    assert made["decisions"] == {"pass through": 1345, "quantize": 126, "drop": 126}
    assert {row["tensor_parallel"]: (row["fits"], row["marlin"]) for row in made["tensor_parallel"]} == {
        1: (True, True), 2: (True, True), 4: (True, True), 8: (True, False), 16: (False, False)}  # 1280 inputs of down_proj


def test_refusing_writes_nothing(tmp_path):
    settings, _, _ = planned(tmp_path, "source=step37_fp8")
    before = sorted(tmp_path.rglob("*"))
    shutil.rmtree(settings.run_directory / "shards")
    plan.refuse(settings)
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != "shards"]


def test_a_width_that_is_no_multiple_of_the_block_is_refused_with_the_block(tmp_path):
    overrides = ["source=step37_bf16", "recipe.groups=[{scheme: mxfp8, patterns: ['model.layers.3.self_attn.o_proj.weight']}]"]
    settings, census, _ = planned(tmp_path, *overrides, fp8=False)
    census["tensors"]["model.layers.3.self_attn.o_proj.weight"]["matrix"][-1] -= 16
    with pytest.raises(UserError, match="is not a multiple of 32, the MXFP8 block"):
        plan.make_plan(settings, census, plan.read_config(settings))


def test_rest_is_what_no_other_role_or_pattern_names(tmp_path):
    groups = ["{scheme: mxfp8, roles: [rest]}", "{scheme: mxfp4, roles: [routed_experts], patterns: ['.*.layers.4.self_attn.o_proj.weight']}"]
    _, _, made = planned(tmp_path, "source=step37_fp8", f"recipe.groups=[{', '.join(groups)}]")
    schemes = {name: entry["scheme"] for name, entry in made["tensors"].items() if "self_attn" in name and entry["matrix"]}
    assert schemes["model.layers.4.self_attn.o_proj.weight"] == "mxfp4" and schemes["model.layers.5.self_attn.o_proj.weight"] == "mxfp8"
    for roles, words in ((["linear", "rest"], "name every weight .* nothing is left for 'rest'"), (["rest"], "given two schemes")):
        groups = [f"{{scheme: mxfp8, roles: [{role}]}}" for role in roles] + ["{scheme: mxfp4, roles: [rest]}"] * (len(roles) == 1)
        with pytest.raises(UserError, match=words):
            planned(tmp_path / "_".join(roles), "source=step37_fp8", f"recipe.groups=[{', '.join(groups)}]")


@pytest.mark.parametrize(("projection", "stored", "rows", "inputs", "ranks", "kind"), [
    ("mlp.experts.0.down_proj", "mxfp4", 4096, 1280, 4, None), ("mlp.experts.0.down_proj", "mxfp4", 4096, 1280, 8, "whole 64s"),
    ("mlp.experts.0.down_proj", "mxfp4", 4096, 1280, 16, "whole blocks of 32"), ("mlp.experts.0.gate_proj", "mxfp4", 1280, 4096, 16, None),
    ("self_attn.o_proj", "fp8 128x128", 4096, 8192, 16, None), ("self_attn.o_proj", "fp8 128x128", 4096, 1024, 16, "FP8 blocks of 128"),
    ("self_attn.k_proj", "fp8 128x128", 1024, 4096, 16, None), ("self_attn.k_proj", "fp8 128x128", 512, 4096, 8, "FP8 blocks of 128"),
    ("self_attn.kv_a_proj_with_mqa", "fp8 128x128", 576, 7168, 8, None), ("self_attn.q_a_proj", "fp8 128x128", 96, 7168, 1, "FP8 blocks of 128"),
    ("self_attn.o_proj", "fp8 per channel", 4096, 1024, 16, None), ("mlp.down_proj", "mxfp8", 4096, 1056, 2, "whole blocks of 32"),
    ("mlp.up_proj", "mxfp8", 1001, 4096, 2, "do not divide by 2"),
])
def test_a_weight_is_split_only_over_ranks_whose_share_of_it_engines_take(projection, stored, rows, inputs, ranks, kind):
    role = "routed_experts" if "experts" in projection else "attention" if "attn" in projection else "dense_mlp"
    entry = {"role": role, "stored": stored, "matrix": [rows, inputs]}
    row = next(row for row in tensor_parallel.notes({f"model.layers.3.{projection}.weight": entry}, query_heads=None, kv_heads=8) if row["tensor_parallel"] == ranks)
    assert (row["reason"] is None) if kind is None else kind in row["reason"], row
    assert row["fits"] == (kind in (None, "whole 64s"))


def test_a_disk_too_small_for_the_whole_release_is_told_by_the_plan(tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=130 * 10**9))
    with pytest.raises(UserError, match="not enough disk: the whole run, by this plan, needs 143.* has 130.00 GB"):
        planned(tmp_path, "source=step37_fp8")
    assert not list(tmp_path.rglob("plan.json"))


def test_the_bf16_release_becomes_the_same_size(tmp_path):
    _, census, made = planned(tmp_path, "source=step37_bf16", fp8=False)
    assert census["tensor_bytes"] == 402_730_656_512
    assert made["release_tensor_bytes"] == 123_295_638_272


def test_the_stacked_layout_keeps_the_sources_number_of_names(tmp_path):
    _, _, made = planned(tmp_path, "source=step37_fp8", "recipe=mxfp4_experts_stacked")
    assert (made["release_tensors"], made["release_tensor_bytes"]) == (1597, 123_295_638_272)


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_plans_the_real_release(tmp_path, recipe):
    _, _, made = planned(tmp_path, "source=step37_fp8", f"recipe={recipe}")
    assert made["quantized_weights"] >= 190_253_629_440


def test_targets_hit_the_experts_that_vllm_asks_for_and_nothing_else(tmp_path):
    _, _, made = planned(tmp_path, "source=step37_fp8")
    section = made["quantization_config"]
    (group,) = section["config_groups"].values()
    assert section["format"] == "mixed-precision" and group["format"] == "mxfp4-pack-quantized"
    assert group["weights"]["scale_dtype"] == "torch.uint8" and group["input_activations"] is None
    modules, faults = coverage(made, section)
    # 45 x (qkv, o, g), 3 x (gate_up, down), 42 x (gate, experts, shared gate_up, down), 3 x (qkv, o, g, gate_up, down,
    # eh_proj, head), 47 x (qkv, out, fc1, fc2), conv1, 2 downsamplers, projector, embeddings, lm_head
    assert faults == [] and modules == 45 * 3 + 3 * 2 + 42 * 4 + 3 * 7 + 47 * 4 + 6


@pytest.mark.parametrize(("targets", "ignore", "fault"), [
    ([r"re:model\.layers\.\d+\.moe\.experts\..*"], [], "no target claims it"),
    (["FusedMoE"], [], "no target claims it"),
    (["Linear"], ["lm_head"], "but target Linear claims it"),
    ([r"re:.*\.moe\.experts\.\d+\.(gate_proj|up_proj)$"], [], "only some of"),
    ([r"re:.*\.moe\.experts\.\d+\..*", r"re:.*\.self_attn\.o_proj$"], [], "o_proj$ claims it"),
    ([r"re:.*\.moe\.experts\.\d+\..*"], [r"re:.*\.k_proj$"], "only some of"),
    ([r"re:.*\.moe\.experts\.\d+\..*", r"re:.*\.mixer\..*"], [], "matches no module"),
])
def test_a_config_that_vllm_would_read_wrongly_is_found(tmp_path, targets, ignore, fault):
    _, _, made = planned(tmp_path, "source=step37_fp8")
    section = json.loads(json.dumps(made["quantization_config"]))
    section["config_groups"]["group_0"]["targets"], section["ignore"] = targets, ignore
    _, faults = coverage(made, section)
    assert any(fault in found for found in faults), faults[:3]


def test_other_roles_and_patterns_are_planned_with_targets_of_their_own(tmp_path):
    _, _, made = planned(tmp_path, "source=step37_fp8",
                         "recipe.groups=[{roles: [routed_experts, attention, shared_experts, dense_mlp]}]")
    quantized = [e for e in made["tensors"].values() if e["decision"] == "quantize"]
    assert {e["role"] for e in quantized} == {"routed_experts", "attention", "shared_experts", "dense_mlp"}
    assert sum(math.prod(e["shape"]) for e in quantized) > 190_253_629_440


@pytest.mark.parametrize(("groups", "words"), [
    ("[{roles: [attentoin]}]", ["'attentoin'", "unknown"]),
    ("[{roles: [routed_experts], patterns: ['model.layers.99.*']}]", ["pattern", "matches no weight"]),
    ("[{roles: [norms]}]", ["no linear weight"]),
    ("[{roles: [routed_experts, router]}]", ["moe.gate.weight", "no linear weight"]),
    ("[{roles: [attention]}]", ["leaves it"]),
    ("[{roles: [routed_experts], scheme: nvfp4}]", ["'nvfp4'", "mxfp4"]),
])
def test_a_recipe_that_would_make_a_wrong_release_is_refused(tmp_path, groups, words):
    with pytest.raises(UserError) as caught:
        planned(tmp_path, "source=step37_fp8", f"recipe.groups={groups}")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_naming_a_part_of_a_layers_experts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"one format is needed for all its parts, but .*layers\.4\.moe"):
        planned(tmp_path, "source=step37_bf16", "recipe.groups=[{patterns: ['.*layers.4.moe.gate_proj.weight']}]",
                fp8=False)


def test_layers_chosen_by_pattern_get_targets_for_those_layers_only(tmp_path):
    groups = "[{roles: [routed_experts]}, {patterns: ['model.layers.(5|6).self_attn.[qkvog]_proj.weight']}]"
    _, _, made = planned(tmp_path, "source=step37_fp8", f"recipe.groups={groups}")
    targets = made["quantization_config"]["config_groups"]["group_0"]["targets"]
    assert any(r"model\.layers\.(5|6)\.self_attn" in target for target in targets)
