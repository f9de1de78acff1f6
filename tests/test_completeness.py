"""Parts of a model that no shard holds: nothing but the model itself says that they should be there, and it is refused, not converted."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import checkup
from stages.checkup import configuring, structure
from stages.checkup.checkpoint import Checkpoint
from stages.errors import UserError
from stages.schemes import tensor_parallel
from tests.conftest import convert, planned
from tests.small_models import save


def without(directory, pattern):
    """The checkpoint without tensors whose names hold the pattern, and without an index, which would name them."""
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    lost = 0
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
        lost += len(tensors) - len(kept)
        save_file(kept, path, {"format": "pt"})
    assert lost, f"{pattern} is in no name"
    return directory


def faults_of(release):
    return [fault for row in checkup.check(release, None, False)["checks"] for fault in row["faults"]]


def plan_of(directory, results, recipe="mxfp4_experts"):
    return planned("source=local", f"source.path={directory}", f"results={results}", f"recipe={recipe}")[1]


def refused(directory, results, named):
    with pytest.raises(UserError, match=named) as found:
        plan_of(directory, results)
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small models of other families, made once."""
    made = {}

    def directory(family, fp8, tmp_path):
        if (family, fp8) not in made:
            made[family, fp8] = save(family, tmp_path_factory.mktemp(family), fp8)
        return shutil.copytree(made[family, fp8], tmp_path / family)
    return directory


@pytest.mark.parametrize(("pattern", "named"), [
    (r"layers\.4\.moe\.", "layer 4"), (r"layers\.4\.self_attn\.", "layer 4.*attention"), (r"layers\.4\.share_expert\.", "layer 4.*shared experts"),
    (r"\.moe\.up_proj\.", "up projection of the routed experts"), (r"\.self_attn\.k_proj\.", "key projection"), (r"\.moe\.gate\.", "router"),
    (r"share_expert", "shared experts"), (r"layers\.0\.self_attn\.o_proj", "layer 0"), (r"layers\.0\.input_layernorm", "layer 0.*input_layernorm"),
    (r"layers\.0\.mlp\.down_proj", "layer 0"), (r"resblocks\.1\.", r"resblocks\.1"), (r"resblocks\.0\.ln_1", r"resblocks\.0\.ln_1"),
    (r"vit_large_projector", "projector"), (r"lm_head", "output head"), (r"layers\.7\.self_attn\.v_proj", "layer 7"),
    (r"layers\.7\.eh_proj", "layer 7"),
])
def test_a_part_that_is_gone_from_the_tiny_model_is_noticed(checkpoint, tmp_path, pattern, named):
    refused(without(checkpoint, pattern), tmp_path / "results", named)


@pytest.mark.parametrize(("family", "fp8", "pattern", "named"), [
    ("glm4_moe", True, r"layers\.2\.mlp\.", "layer 2"), ("glm4_moe", True, r"experts\.\d+\.up_proj", "up projection of the routed experts"),
    ("glm4_moe", True, r"layers\.3\.mlp\.experts\.5\.", r"experts\.5"), ("glm4_moe", True, r"layers\.3\.self_attn\.", "layer 3"),
    ("glm4_moe", False, r"layers\.0\.self_attn\.q_proj", "layer 0"), ("glm4_moe", False, r"lm_head", "output head"),
    ("qwen3_5_moe", True, r"layers\.3\.self_attn\.o_proj", "layer 3"), ("qwen3_5_moe", True, r"mtp\.layers\.0\.mlp\.experts\.5", r"experts\.5"),
    ("qwen3_5_moe", True, r"mtp\.layers\.0\.self_attn\.", "layer 4"),
])
def test_a_part_that_is_gone_from_another_family_is_noticed(small, tmp_path, family, fp8, pattern, named):
    directory = without(small(family, fp8, tmp_path), pattern)
    if "lm_head" in pattern:  # where config.json does not say that it is the embedding, it is not
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(re.sub(r'"tie_word_embeddings": (true|false),? ?', "", text))
    refused(directory, tmp_path / "results", named)


def test_a_model_that_has_lost_all_its_experts_is_noticed(small, tmp_path):
    directory = without(small("qwen3_moe", False, tmp_path), r"\.mlp\.")
    with pytest.raises(UserError, match="MLP"):
        plan_of(directory, tmp_path / "results", "mxfp4_all_linear")


@pytest.mark.parametrize(("pattern", "named"), [
    (r"layers\.4\.moe\.experts\.", "layer 4"), (r"layers\.4\.self_attn\.", "layer 4"), (r"layers\.0\.mlp\.down_proj", "layer 0"),
    (r"vit_large_projector", "projector"), (r"lm_head", "output head"), (r"layers\.7\.eh_proj", "layer 7"), (r"experts\.\d+\.up_proj", "up projection"),
])
def test_verify_notices_a_part_that_is_gone_from_a_release(release, pattern, named):
    found = faults_of(without(release, pattern))
    assert any(re.search(named, fault) for fault in found), found


def test_experts_under_names_that_the_architecture_does_not_load_are_found(release):
    for path in release.glob("*.safetensors"):
        tensors = {re.sub(r"(experts\.\d+\.)(gate|up|down)_proj", lambda m: m[1] + {"gate": "w1", "up": "w3", "down": "w2"}[m[2]], name): tensor
                   for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    (release / "model.safetensors.index.json").unlink()
    found = faults_of(release)
    assert any("loads experts" in fault for fault in found), found


def test_the_stacked_layout_is_for_architectures_whose_loader_reads_it(small, tmp_path):
    directory = small("qwen3_moe", False, tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for layer in range(3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            members = [tensors.pop(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight") for expert in range(8)]
            tensors[f"model.layers.{layer}.mlp.experts.{name}.weight"] = torch.stack(members)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="one by one only.*per_expert"):
        plan_of(directory, tmp_path / "results", "mxfp4_experts_stacked")
    assert plan_of(directory, tmp_path / "results")["engines"][0]["loads"] != "no"


def test_stacked_experts_that_a_target_claims_though_they_are_plain_are_found(small, tmp_path):
    """They have no `.weight` in their names, and vLLM takes a target Linear for experts, too."""
    directory = small("qwen3_5_moe", False, tmp_path)
    release = convert("source=local", f"source.path={directory}", f"results={tmp_path / 'results'}", "recipe.name=attention",
                      "recipe.groups=[{roles: [attention]}]").run_directory / "release"
    assert not faults_of(release)
    (release / "manifest.json").unlink()
    config = json.loads((release / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    config["quantization_config"]["ignore"] = [r"re:.*\.gate$", r"re:.*(visual|linear_attn|shared_expert|lm_head|mtp).*"]
    group["targets"] = ["Linear"]
    (release / "config.json").write_text(json.dumps(config))
    assert any("mlp.experts: stored unquantized, but target" in fault for fault in faults_of(release)), faults_of(release)
    without(release, r"\.experts\.")
    assert any("no tensor is one's" in fault for fault in faults_of(release))


def test_plain_names_in_a_config_are_mapped_as_vllm_maps_them(small, tmp_path):
    """As llm-compressor writes them: a target Linear, and the checkpoint's names of all that is not quantized."""
    directory = small("qwen3_5_moe", False, tmp_path)
    release = convert("source=local", f"source.path={directory}", f"results={tmp_path / 'results'}").run_directory / "release"
    (release / "manifest.json").unlink()
    config = json.loads((release / "config.json").read_text())
    section = config["quantization_config"]
    section["config_groups"]["group_0"]["targets"] = ["Linear"]
    with Checkpoint(release) as opened:
        assert not list(structure.containers(opened))
        plain = [module for module, (stored, info, *_) in opened.modules.items() if stored == "plain" and not module.startswith("mtp.")]
    for names, wrong in ((plain, False), ([name for name in plain if not name.endswith("o_proj")], True)):
        section["ignore"] = [r"re:.*mtp.*", *names]
        (release / "config.json").write_text(json.dumps(config))
        assert bool(faults_of(release)) == wrong


@pytest.mark.parametrize(("family", "change", "named"), [
    ("exaone_moe", lambda name: name.replace("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"), "vLLM routes ExaoneMoEForCausalLM's"),
    ("bailing_moe_v2", lambda name: name.replace("model.layers.2.", "model.layers.3."), "belongs to a draft layer; vLLM has none"),
    ("mimo_v2_flash", "MiMoV2ForCausalLM", "MiMoV2ForCausalLM is not converted"),
])
def test_a_model_that_vllm_would_serve_wrong_is_found_in_a_release_too(small, tmp_path, family, change, named):
    directory = small(family, False, tmp_path)
    release = convert("source=local", f"source.path={directory}", f"results={tmp_path / 'results'}").run_directory / "release"
    (release / "manifest.json").unlink()
    (release / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((release / "config.json").read_text())
    if isinstance(change, str):
        config["architectures"] = [change]
    else:
        for path in release.glob("*.safetensors"):
            tensors = load_file(path)
            save_file({new: tensor.clone() for name, tensor in tensors.items() for new in {name, change(name)}
                       if new != name or change(name) == name or family == "bailing_moe_v2"}, path, {"format": "pt"})
        config["num_nextn_predict_layers"] = int(family == "bailing_moe_v2")
    (release / "config.json").write_text(json.dumps(config))
    assert any(named in fault for fault in faults_of(release)), faults_of(release)
    with pytest.raises(UserError, match=f"{named}|there is no layer 3: eh_proj"):
        configuring.run(release, None, dry_run=True)


def test_ranks_over_which_draft_layers_cannot_be_split_are_told_apart():
    entry = {"role": "mtp", "stored": "fp8 128x128", "matrix": [2048, 512]}
    rows = {row["tensor_parallel"]: row for row in tensor_parallel.notes({"mtp.layers.0.mlp.experts.0.down_proj.weight": entry}, 16, 2)}
    assert all(row["fits"] and row["marlin"] for row in rows.values()) and rows[4]["drafts"] is None
    assert "512 inputs / 8 are not whole FP8 blocks" in rows[8]["drafts"]


def test_ranks_that_do_not_divide_the_heads_are_not_offered():
    def fitting(queries, heads):
        return [note["tensor_parallel"] for note in tensor_parallel.notes({}, queries, heads) if note["fits"]]

    assert fitting(20, 4) == [1, 2, 4] and fitting(40, 8) == [1, 2, 4, 8]
    assert fitting(64, 12) == [1, 2, 4] and fitting(64, 2) == [1, 2, 4, 8, 16] and fitting(None, None) == [1, 2, 4, 8, 16]
