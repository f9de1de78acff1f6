"""`mxforge plan`, `verify` and `config`: what a user types, what comes back, and that no damage on purpose gets through."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.fp8 import decode_block_fp8
from stages import checkup, command_line
from stages.errors import UserError
from tests.conftest import PROJECT, TINY, convert
from tests.hub_server import HubServer
from tests.small_models import block_fp8, save
from tests.step37_flash import write_checkpoint

LAYER = "model.layers.2.moe.experts"


def mxforge(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "stages.command_line", *map(str, arguments)], cwd=PROJECT, text=True,
                          capture_output=True, env={**os.environ, **environment})


def faults(directory, *, source=None, quick=False) -> dict[str, list[str]]:
    return {row["check"]: row["faults"] for row in checkup.check(directory, source, quick)["checks"] if row["faults"]}


def change(directory, action, contains=f"{LAYER}.3.gate_proj.weight_packed", index=True):
    """Applies `action` to the tensors of the shard that holds `contains`, and keeps the index true."""
    path = next(p for p in directory.glob("*.safetensors") if contains in load_file(p))
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if index:
        found = {name: p.name for p in sorted(directory.glob("*.safetensors")) for name in load_file(p)}
        total = sum(t.nbytes for p in directory.glob("*.safetensors") for t in load_file(p).values())
        text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(found.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(text))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_release_without_an_end_of_its_model_is_found(release, name):
    change(release, lambda tensors: tensors.pop(name), contains=name)
    assert "layers" in faults(release)


def edit_config(directory, action):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    action(config["quantization_config"])
    path.write_text(json.dumps(config))


def shift_exponents(tensors):
    tensors[f"{LAYER}.3.gate_proj.weight_scale"] += 1


def swap(tensors, first, second):
    for part in ("weight_packed", "weight_scale"):
        tensors[f"{first}.{part}"], tensors[f"{second}.{part}"] = tensors[f"{second}.{part}"], tensors[f"{first}.{part}"]


TENSOR_DAMAGES = {
    "missing_expert": (lambda t: [t.pop(f"{LAYER}.5.down_proj.{p}") for p in ("weight_packed", "weight_scale")],
                       "experts", f"there is no {LAYER}.5.down_proj"),
    "missing_scale": (lambda t: t.pop(f"{LAYER}.5.down_proj.weight_scale"), "pairs", f"{LAYER}.5.down_proj.weight_packed has no"),
    "missing_projection": (lambda t: [t.pop(name) for name in list(t) if f"{LAYER}." in name and ".up_proj." in name],
                           "experts", f"no expert has {LAYER}.*.up_proj"),
    "extra_expert": (lambda t: t.update({f"{LAYER}.16.gate_proj.{p}": t[f"{LAYER}.3.gate_proj.{p}"].clone()
                                         for p in ("weight_packed", "weight_scale")}), "experts", "config.json has 16 experts, but there is"),
    "extra_scale": (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight_scale": torch.ones(1)}), "pairs", "no weight belongs to"),
    "wrong_suffix": (lambda t: t.update({f"{LAYER}.3.gate_proj.weight_scales": t.pop(f"{LAYER}.3.gate_proj.weight_scale")}),
                     "pairs", "weight_packed has no"),
    "wrong_packed_suffix": (lambda t: t.update({f"{LAYER}.3.gate_proj.weight_pack": t.pop(f"{LAYER}.3.gate_proj.weight_packed")}),
                            "pairs", "no engine asks for names like"),
    "scale_of_another_shape": (lambda t: t.update({f"{LAYER}.3.gate_proj.weight_scale": t[f"{LAYER}.3.gate_proj.weight_scale"][:, :-1].clone()}),
                               "pairs", "expected U8"),
    "scale_of_another_dtype": (lambda t: t.update({f"{LAYER}.3.gate_proj.weight_scale": t[f"{LAYER}.3.gate_proj.weight_scale"].float()}),
                               "pairs", "is F32"),
    "one_expert_unquantized": (lambda t: (t.pop(f"{LAYER}.3.gate_proj.weight_scale"), t.update(
        {f"{LAYER}.3.gate_proj.weight": t.pop(f"{LAYER}.3.gate_proj.weight_packed").repeat(1, 2).to(torch.bfloat16)})),
        "experts", "reads all experts of a layer as one format"),
    "scale_nan": (lambda t: t[f"{LAYER}.3.gate_proj.weight_scale"].__setitem__((2, 1), 255), "numbers", "which means NaN"),
    "exponents_off_by_one": (shift_exponents, "numbers", "times as large as its siblings', half of which lie within"),
    "exponents_too_high": (lambda t: t.update({f"{LAYER}.3.gate_proj.weight_packed": t[f"{LAYER}.3.gate_proj.weight_packed"] & 0x99}),
                           "numbers", "no value of 3 or above"),
    "packed_without_rows": (lambda t: t.update({f"{LAYER}.3.gate_proj.{p}": t[f"{LAYER}.3.gate_proj.{p}"][:0].clone()
                                                for p in ("weight_packed", "weight_scale")}), "pairs", "which is no matrix"),
    "packed_of_one_dimension": (lambda t: t.update({f"{LAYER}.3.gate_proj.{p}": t[f"{LAYER}.3.gate_proj.{p}"][0].clone()
                                                    for p in ("weight_packed", "weight_scale")}), "pairs", "which is no matrix"),
    "scales_out_of_range": (lambda t: [t[name].fill_(254) for name in t if name.endswith("weight_scale")], "numbers", "infinite"),
    "scales_zero": (lambda t: [t[name].zero_() for name in t if name.endswith("weight_scale")], "numbers", "which no network has"),
    "scales_huge": (lambda t: [t[name].fill_(200) for name in t if name.endswith("weight_scale")], "numbers", "which no network has"),
    "nan_in_a_norm": (lambda t: t["model.layers.2.input_layernorm.weight"].__setitem__(0, math.nan), "numbers", "holds NaN"),
    "packed_zeros": (lambda t: [t[name].zero_() for name in t if name.endswith("weight_packed")], "numbers", "nothing but zeros"),
    "one_expert_twice": (lambda t: [t.update({f"{LAYER}.3.{n}": t[f"{LAYER}.4.{n}"].clone()})
                                    for n in ("up_proj.weight_packed", "up_proj.weight_scale")], "numbers", "was written twice"),
    "missing_q_proj": (lambda t: t.pop("model.layers.2.self_attn.q_proj.weight"), "layers", "there is no layer 2: self_attn.q_proj.weight"),
    "missing_norm": (lambda t: t.pop("model.layers.2.input_layernorm.weight"), "layers", "there is no layer 2: input_layernorm"),
    "no_experts_in_a_layer": (lambda t: [t.pop(name) for name in list(t) if f"{LAYER}." in name], "layers", "there is no layer 2: moe.experts"),
    "layer_too_many": (lambda t: t.update({"model.layers.77.input_layernorm.weight": torch.ones(4)}), "layers", "there are tensors of layer 77"),
    "nan_passed_through": (lambda t: t["model.layers.2.self_attn.q_proj.weight"].__setitem__((0, 0), math.nan), "numbers", "holds NaN"),
    "zeros_passed_through": (lambda t: t["model.layers.2.self_attn.q_proj.weight"].zero_(), "numbers", "nothing but zeros"),
    "both_layouts": (lambda t: t.update({f"model.layers.2.moe.gate_proj.{p}": torch.stack(
        [t[f"{LAYER}.{e}.gate_proj.{p}"] for e in range(16)]) for p in ("weight_packed", "weight_scale")}), "experts", "stacked and expert by expert"),
    "strange_names": (lambda t: t.update({"../../x.weight": torch.ones(2, 32)}), "pairs", "no engine asks for names like"),
    "attention_as_mxfp4": (lambda t: (t.pop("model.layers.2.self_attn.o_proj.weight"), t.update(
        {f"model.layers.2.self_attn.o_proj.{p}": t[f"{LAYER}.3.down_proj.{p}"].clone() for p in ("weight_packed", "weight_scale")})),
        "coverage", "no target claims it"),
}


def test_scales_that_are_all_alike_are_noted(release):
    change(release, lambda t: [t[name].fill_(120) for name in t if name.endswith("weight_scale")])
    assert any("all blocks looked at have the same scale" in note for note in checkup.check(release)["notes"])


def test_a_sound_release_passes_every_check_and_shows_one_page(converted, release):
    assert faults(release, source=TINY) == {}
    shown = mxforge("verify", converted.run_directory / "release", "--source", TINY)
    assert shown.returncode == 0 and shown.stdout.count("pass") == 10 and len(shown.stdout.splitlines()) < 15, shown.stdout


@pytest.mark.parametrize("name", TENSOR_DAMAGES)
def test_damaged_tensors_are_found_without_manifest_and_source(release, name):
    action, check, words = TENSOR_DAMAGES[name]
    change(release, action)
    found = faults(release)
    assert check in found and any(words in fault for fault in found[check]), found
    assert all("\n" not in fault for lines in found.values() for fault in lines)


@pytest.mark.parametrize(("action", "check", "words"), [
    (lambda c: c["config_groups"]["group_0"]["weights"].pop("scale_dtype"), "scheme_arguments", "scale_dtype is None"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=16), "scheme_arguments", "group_size is 16"),
    (lambda c: c["config_groups"]["group_0"].pop("format"), "scheme_arguments", "has no format of its own"),
    (lambda c: c.update(config_groups={}), "scheme_arguments", "no config_groups"),
    (lambda c: c["config_groups"]["group_0"].update(targets=["FusedMoE"]), "coverage", "no target claims it"),
    (lambda c: c["config_groups"]["group_0"].update(targets=[r"re:model\.layers\.\d+\.moe\..*"]), "coverage", "matches no module"),
    (lambda c: (c["config_groups"]["group_0"].update(targets=["Linear"]), c.update(ignore=["lm_head"])), "coverage", "vLLM would expect mxfp4"),
    (lambda c: c.update(ignore=[r"re:.*\.q_proj$"]), "coverage", "names only some of"),
    (lambda c: c["config_groups"]["group_0"]["targets"].append("re:.*no_such_module"), "coverage", "matches no module of the model"),
    (lambda c: c["config_groups"]["group_0"].update(format="mxfp8-quantized"), "coverage", "stored as mxfp4, but its group says mxfp8"),
    (lambda c: c["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"), "coverage", "its group says nvfp4"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(dynamic=True), "scheme_arguments", "dynamic is True"),
    (lambda c: c["ignore"].append(r"re:.*experts\.0\.up_proj$"), "coverage", "find a scheme"),
])
def test_configs_that_vllm_would_read_otherwise_are_found(release, action, check, words):
    edit_config(release, action)
    found = faults(release, quick=True)
    assert check in found and any(words in fault for fault in found[check]), found


def test_swapped_shards_and_lying_indexes_are_found(release):
    index = release / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    index.write_text(json.dumps({**text, "metadata": {"total_size": 1}}))
    assert "total_size is 1" in faults(release)["index"][0]
    index.write_text(json.dumps({**text, "weight_map": dict(list(text["weight_map"].items())[1:])}))
    assert "does not list" in faults(release)["index"][0]
    index.write_text(json.dumps(text))
    first, second = (release / f"model-0000{n}.safetensors" for n in (2, 3))
    first.rename(release / "aside")
    second.rename(first)
    (release / "aside").rename(second)
    assert "names the wrong shard for" in faults(release)["index"][0]


def test_unreadable_shards_are_found(release):
    path = release / "model-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    assert "is truncated" in faults(release)["containers"][0]
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in faults(release)["containers"][0]
    shutil.copy(release / "model-00003.safetensors", path)
    assert "is in model-00002.safetensors and in model-00003.safetensors" in faults(release)["containers"][0]


@pytest.mark.parametrize(("action", "contains", "words"), [
    (shift_exponents, f"{LAYER}.3.gate_proj.weight_packed", "dB SQNR against the source"),
    (lambda t: [t[name].add_(1) for name in t if "experts" in name and name.endswith("weight_scale")],
     f"{LAYER}.3.gate_proj.weight_packed", "dB SQNR against the source"),
    (lambda t: swap(t, f"{LAYER}.3.gate_proj", f"{LAYER}.3.up_proj"), f"{LAYER}.3.gate_proj.weight_packed", "dB SQNR"),
    (lambda t: swap(t, f"{LAYER}.3.gate_proj", f"{LAYER}.4.gate_proj"), f"{LAYER}.3.gate_proj.weight_packed", "dB SQNR"),
    (lambda t: t["model.norm.weight"].view(torch.uint8).__setitem__(0, t["model.norm.weight"].view(torch.uint8)[0] ^ 1),
     "model.norm.weight", "not bit-identical"),
    (lambda t: t.pop("model.layers.2.self_attn.q_proj.weight"), "model.layers.2.self_attn.q_proj.weight", "there is nothing of the source's"),
    (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": t["model.layers.2.self_attn.q_proj.weight"].float()}),
     "model.layers.2.self_attn.q_proj.weight", "is F32"),
    (lambda t: t[f"{LAYER}.3.down_proj.weight_packed"][40:100].zero_(), f"{LAYER}.3.down_proj.weight_packed", "dB SQNR"),
    (lambda t: [t.pop(f"{LAYER}.3.gate_proj.{p}") for p in ("weight_packed", "weight_scale")],
     f"{LAYER}.3.gate_proj.weight_packed", "the expert was lost"),
])
def test_a_source_shows_what_the_codes_cannot(release, action, contains, words):
    change(release, action, contains)
    found = faults(release, source=TINY)
    assert any(words in fault for fault in found["against_source"]), found


O_PROJ = "model.layers.2.self_attn.o_proj.weight"
SOURCES = "model.layers.2.moe.up_proj.weight"


@pytest.mark.parametrize(("of_release", "of_source", "words"), [
    (TENSOR_DAMAGES["one_expert_twice"][0],
     lambda t: [t[name].view(torch.uint8)[3].copy_(t[name].view(torch.uint8)[4]) for name in (SOURCES, f"{SOURCES}_scale_inv")], "written twice"),
    (lambda t: t[O_PROJ].zero_(), lambda t: t[O_PROJ].zero_(), "nothing but zeros"),
])
def test_what_is_odd_in_the_source_is_no_fault_of_its_release(release, checkpoint, of_release, of_source, words):
    change(release, of_release)
    change(checkpoint, of_source, SOURCES, index=False)
    (checkpoint / "manifest.json").write_text("{}")  # a release may be a source, too
    assert faults(release, source=checkpoint) == {}
    assert any(words in fault for fault in faults(release)["numbers"])


def test_a_source_shows_a_single_row_that_was_lost_or_is_anothers(release):
    """As a page of zeros in a file leaves it, which the SQNR of the whole matrix hardly shows."""
    def damage(tensors):
        tensors[f"{LAYER}.3.down_proj.weight_packed"][40].zero_()
        rows = tensors[f"{LAYER}.4.down_proj.weight_packed"]
        rows[40:42] = rows[40:42].flip(0).clone()

    change(release, damage)
    found = faults(release, source=TINY)["against_source"]
    assert [bool(re.match(rf"{LAYER}.{expert}.down_proj: row 4[01] has -?[0-3]\.\d dB SQNR", fault)) for expert, fault in enumerate(found, 3)] == [True] * 2


def test_rows_of_zeros_at_both_ends_are_not_taken_for_a_matrix_of_zeros(release):
    def pad(tensors):
        for rows in [tensors[name] for name in tensors if name.endswith("weight_packed")]:
            rows[:16], rows[-16:] = 0, 0

    change(release, pad)
    assert faults(release) == {}


def test_names_of_weight_norm_are_not_odd(release):
    change(release, lambda t: t.update({"vision_model.conv.weight_g": torch.ones(4), "vision_model.conv.weight_v": torch.randn(4, 4)}))
    assert "pairs" not in faults(release)


def test_a_fused_half_may_begin_within_a_tile_of_the_source(tmp_path):
    inner = 192  # gate ends in the middle of the second tile of 128 rows
    source = save("qwen3_5_moe", tmp_path / "model")
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    config["text_config"]["moe_intermediate_size"] = inner
    fused = dict(tensors)
    for name in list(tensors):
        if re.search(r"mtp.*\.experts\.", name):
            tensors[name] = fused[name] = torch.randn((256, inner) if "down" in name else (inner, 256)).bfloat16() * 0.05
        elif re.search(r"experts\.(gate_up|down)_proj$", name):
            rows = torch.randn(8, *((256, inner) if "down" in name else (2 * inner, 256))) * 0.05
            rows *= 1 + 2 * (torch.arange(rows.shape[1]) // 128)[:, None]
            made = [block_fp8(each) for each in rows]
            fused[name], fused[f"{name}_scale_inv"] = torch.stack([codes for codes, _ in made]), torch.stack([scale for _, scale in made])
            tensors[name] = torch.stack([decode_block_fp8(*each, (128, 128)) for each in made])
    for directory, content in ((source, tensors), (tmp_path / "fused", fused)):
        directory.mkdir(exist_ok=True)
        save_file(content, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    release = convert("source=local", f"source.path={source}", f"results={tmp_path / 'results'}").run_directory / "release"
    for quick in (False, True):
        assert faults(release, source=source, quick=quick) == faults(release, source=tmp_path / "fused", quick=quick) == {}


def test_a_source_shows_what_was_added(release):
    for value, inert in ((1.0, True), (2.0, False)):
        change(release, lambda t: t.update({"model.layers.6.self_attn.attn.k_scale": torch.tensor([value])}), "model.norm.weight")
        assert ("against_source" not in faults(release, source=TINY)) is inert
    change(release, lambda t: (t.pop("model.layers.6.self_attn.attn.k_scale"), t.update(
        {f"model.layers.{layer}.self_attn.o_proj.bias": torch.full((256,), 5.0) for layer in range(6)})), "model.norm.weight")
    (found,) = faults(release, source=TINY)["against_source"]
    assert found.startswith("the source has no model.layers.0.self_attn.o_proj.bias and 5 more")


def test_a_source_shows_another_tokenizer(release, checkpoint):
    (checkpoint / "vocab.json").write_text("{}")
    (release / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes() + b"\n")
    result = checkup.check(release, checkpoint, quick=True)
    assert result["passed"] and {note.partition(":")[0] for note in result["notes"]} == {"tokenizer.json", "vocab.json"}, result["notes"]


def test_a_source_shows_what_was_changed_in_the_config(release, checkpoint):
    changes = {"rope_theta": 1.0, "sliding_window": 32, "moe_top_k": 1}
    renamed = {"transformers_version": "9", "torch_dtype": "bfloat16", "x": 1.0}
    for directory, added in ((release, renamed), (checkpoint, {"dtype": "bfloat16", "x": 1})):
        config = json.loads((directory / "config.json").read_text())
        config["text_config"] |= {"time_step_limit": [0.0, math.inf, math.nan], "tie_word_embeddings": None}
        (directory / "config.json").write_text(json.dumps(config | added))
    assert faults(release, source=checkpoint, quick=True) == {}
    config = json.loads((release / "config.json").read_text())
    assert changes.keys() <= config["text_config"].keys()
    config["text_config"] |= changes
    config["text_config"] |= {"attention_dropout": 0.0, "rope_parameters": {"factor": 2.0, "rope_theta": 1e4}}
    (release / "config.json").write_text(json.dumps(config))
    result = checkup.check(release, checkpoint, quick=True)
    (found,) = [row["faults"] for row in result["checks"] if row["faults"]]
    assert [fault.split()[1] for fault in found] == [f"text_config.{key}" for key in sorted({*changes, "rope_parameters.rope_theta"})]
    assert any("says what the source's does not: text_config.attention_dropout, " in note for note in result["notes"])


def test_the_manifest_shows_any_changed_byte(converted, release):
    shutil.copy(converted.run_directory / "release" / "manifest.json", release)
    assert faults(release) == {}
    path = release / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert "not those of manifest.json" in faults(release)["manifest"][0]
    manifest = json.loads((release / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (release / "manifest.json").write_text(json.dumps(manifest))
    assert "does not list tokenizer.json" in faults(release)["manifest"][0]


def test_a_source_that_is_none_is_named_and_not_blamed_on_the_release(release, tmp_path):
    links, part, twice = tmp_path / "links", tmp_path / "part", tmp_path / "twice"
    shutil.copytree(release, links, copy_function=os.link)
    shutil.copytree(TINY, part)
    (part / "model-00003.safetensors").unlink()
    shutil.copytree(TINY, twice)
    shutil.copy(TINY / "model-00003.safetensors", twice / "model-00009.safetensors")
    for source, words in ((release, "is a release itself"), (links, "is a release itself"), (tmp_path, "holds no tensor"),
                          (part, "names model-00003.safetensors")):
        shown = mxforge("verify", release, "--source", source)
        assert shown.returncode == 1 and f"--source {source}" in shown.stderr and words in shown.stderr, shown.stderr
    with pytest.raises(UserError, match=f"{twice}/model-00009.safetensors: holds .* a tensor belongs to one shard"):
        checkup.check(release, twice, quick=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(TINY, damaged)
    change(damaged, lambda t: t["model.layers.2.moe.gate_proj.weight_scale_inv"].fill_(math.nan), "model.layers.2.moe.gate_proj.weight", index=False)
    assert any("the source is damaged" in fault for fault in faults(release, source=damaged)["against_source"])
    name = "model.layers.2.self_attn.q_proj.weight"  # FP8 that somebody decoded into the BF16 of the release
    shutil.copytree(TINY, damaged, dirs_exist_ok=True)
    change(damaged, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((3, 2), math.nan)}), name, index=False)
    assert any("the source is damaged" in fault for fault in faults(release, source=damaged)["against_source"])


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "[" * 100_000, '{"text_config": [1]}', '{"quantization_config": []}', *(
    json.dumps({"quantization_config": {"quant_method": "compressed-tensors", **section}}) for section in (
        {"config_groups": [1]}, {"config_groups": {"a": None}}, {"config_groups": {"a": {"targets": "Linear"}}},
        {"config_groups": {"a": {"targets": ["re:("]}}}, {"config_groups": {"a": {"targets": ["x"], "weights": "x"}}},
        {"config_groups": {"a": {"targets": ["x"], "format": ["x"]}}}, {"config_groups": {}, "ignore": 3}, {"ignore": [None]}))])
def test_a_config_of_another_form_is_one_line(release, text):
    (release / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        checkup.check(release)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [
    ("model.safetensors.index.json", "[]"), ("model.safetensors.index.json", '{"weight_map": [1], "metadata": 3}'),
    ("manifest.json", "[]"), ("manifest.json", '{"files": [1]}'), ("manifest.json", '{"files": {"config.json": null}}')])
def test_tables_of_another_form_are_faults(release, name, text):
    (release / name).write_text(text)
    assert faults(release, quick=True), name
    before = (release / "config.json").read_bytes()
    edit_config(release, lambda c: c["config_groups"]["group_0"].update(targets=["FusedMoE"]))
    edited = (release / "config.json").read_bytes()
    if name == "manifest.json" and text != '{"files": {"config.json": null}}':
        assert mxforge("config", release).returncode == 1 and (release / "config.json").read_bytes() == edited != before


def test_odd_counts_and_pipes_are_faults(release):
    config = json.loads((release / "config.json").read_text())
    for change_ in ({"num_hidden_layers": 7}, {"num_hidden_layers": True}, {"moe_num_experts": "16"}, {"moe_num_experts": 0}):
        (release / "config.json").write_text(json.dumps({**config, "text_config": {**config["text_config"], **change_}}))
        assert faults(release, quick=True), change_
    (release / "config.json").write_text(json.dumps(config))
    os.mkfifo(release / "model-00009.safetensors")
    assert "is no regular file" in faults(release, quick=True)["containers"][0]


@pytest.mark.parametrize("other", [None, 0])
def test_experts_are_counted_by_the_key_that_has_a_number(release, other):
    """A class of configs has keys of its relatives, too, which say nothing."""
    config = json.loads((release / "config.json").read_text())
    config["text_config"] |= {"moe_num_experts": other, "num_experts": 16}
    (release / "config.json").write_text(json.dumps(config))
    assert faults(release, quick=True) == {}
    for path in release.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(path).items() if ".experts.15." not in name}, path, {"format": "pt"})
    assert any("there is no model.layers.1.moe.experts.15." in fault for fault in faults(release, quick=True)["experts"])


def test_counts_that_no_list_could_hold_are_faults_at_once(release):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "text_config": {**config["text_config"], "moe_num_experts": 10**15}}))
    assert f"there is no {LAYER}.16." in " ".join(faults(release, quick=True)["experts"])
    del config["text_config"]["moe_num_experts"]
    (release / "config.json").write_text(json.dumps(config))
    change(release, lambda t: t.update({f"{LAYER}.{10**15}.gate_proj.{p}": t[f"{LAYER}.3.gate_proj.{p}"].clone()
                                        for p in ("weight_packed", "weight_scale")}))
    assert f"there is no {LAYER}.16.gate_proj" in " ".join(faults(release, quick=True)["experts"])


def test_draft_layers_of_null_are_none(release):
    config = json.loads((release / "config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"] + config["text_config"]["num_nextn_predict_layers"]
    config["text_config"].update(num_hidden_layers=layers, num_nextn_predict_layers=None)
    (release / "config.json").write_text(json.dumps(config))
    assert "layers" not in faults(release, quick=True)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, torch.ones(1)), (torch.uint8, torch.full((64, 2), 120, dtype=torch.uint8))])
def test_quantized_weights_whose_name_ends_in_weight_without_a_dot_are_checked(release, dtype, scale):
    name = "vision_model.transformer.resblocks.0.attn.in_proj_weight"
    change(release, lambda t: t.update({name: torch.randn(64, 64).to(torch.float8_e4m3fn), f"{name}_scale": scale}), name)
    assert not any("could not be checked" in fault for lines in faults(release).values() for fault in lines)
    change(release, lambda t: t[f"{name}_scale"].fill_(math.nan if dtype == torch.float32 else 255), name)
    assert any("NaN" in fault and name.removesuffix("_weight") in fault for fault in faults(release)["numbers"])


@pytest.mark.parametrize("architectures", [[["x"]], [{}], [3], {"a": 1}, "x", []])
def test_architectures_of_another_form_are_unknown_ones(release, architectures):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    assert any("the runtime names of None are not known" in note for note in checkup.check(release, quick=True)["notes"])
    shown = mxforge("config", release)
    assert shown.returncode == 1 and "for architecture None are not known" in shown.stderr and len(shown.stderr.splitlines()) == 1, shown.stderr


def test_two_sections_that_differ_are_a_fault(release):
    """Of a source whose section stands in text_config: vLLM builds the model by the one, its draft layers by the other."""
    config = json.loads((release / "config.json").read_text())
    for section, words in ((config["quantization_config"], ""), ({"quant_method": "fp8"}, "text_config has another quantization_config")):
        config["text_config"]["quantization_config"] = section
        (release / "config.json").write_text(json.dumps(config))
        assert words in " ".join(faults(release, quick=True).get("scheme_arguments", [])) and bool(words) == bool(faults(release, quick=True))


def test_an_unused_ignore_is_a_note(release):
    edit_config(release, lambda c: c["ignore"].append("re:.*no_such_module"))
    result = checkup.check(release, quick=True)
    assert result["passed"] and any("no_such_module" in note for note in result["notes"])


def test_a_fault_is_a_page_one_last_line_and_exit_status_1(release, monkeypatch, capsys):
    change(release, shift_exponents)
    shown = mxforge("verify", release)
    assert shown.returncode == 1 and "FAIL" in shown.stdout and len(shown.stderr.splitlines()) == 1
    for arguments, words in ((("verify", release / "none"), "no such directory"), (("config", release / "none"), "no such directory"),
                             (("plan", "nothing"), "no hub repository"), (("verify", TINY), "only compressed-tensors")):
        monkeypatch.setattr(sys, "argv", ["mxforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        error = capsys.readouterr().err
        assert ended.value.code == 1 and words in error and len(error.splitlines()) == 1, error
    monkeypatch.setattr(sys, "argv", ["mxforge", "verify", str(release), "--quick", "--json"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_config_makes_the_same_file_again_and_the_manifest_follows(converted, release):
    original = (release / "config.json").read_bytes()
    shutil.copy(converted.run_directory / "release" / "manifest.json", release)
    manifest = (release / "manifest.json").read_bytes()
    edit_config(release, lambda c: c["config_groups"]["group_0"].update(targets=["FusedMoE"]))
    assert "coverage" in faults(release, quick=True)
    dry = mxforge("config", release, "--dry-run")
    assert dry.stdout.encode() == original and (release / "config.json").read_bytes() != original
    assert mxforge("config", release).returncode == 0
    assert (release / "config.json").read_bytes() == original and (release / "manifest.json").read_bytes() == manifest
    change(release, lambda t: t.pop(f"{LAYER}.5.down_proj.weight_scale"))
    refused = mxforge("config", release)
    assert refused.returncode == 1 and "fix that first" in refused.stderr


W4A4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": True, "scale_dtype": "torch.uint8"}


def test_config_keeps_what_no_tensor_tells(release):
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    edit_config(release, lambda c: c.update(kv_cache_scheme=cache))
    edit_config(release, lambda c: c["config_groups"]["group_0"].update(input_activations=W4A4, output_activations=W4A4))
    right = json.loads((release / "config.json").read_text())
    edit_config(release, lambda c: c["config_groups"]["group_0"].update(targets=["FusedMoE"]))
    assert mxforge("config", release).returncode == 0
    assert json.loads((release / "config.json").read_text()) == right


@pytest.mark.parametrize(("action", "words"), [
    (lambda c: c["config_groups"].update(other={"targets": [], "weights": c["config_groups"]["group_0"]["weights"], "input_activations": W4A4}),
     "group_0 and other quantize activations in two ways"),
    (lambda c: c["config_groups"]["group_0"].update(weights={"num_bits": 8, "type": "float", "strategy": "tensor"}, input_activations=W4A4),
     "group_0 quantizes activations, but no tensor is stored as its weights say"),
    (lambda c: c.update(transform_config={"config_groups": {"u": {}}}), "has transform_config"),
    (lambda c: c.update(config_groups={"group_0": None}), "group_0: is null"),
])
def test_config_refuses_what_it_could_not_say_again(release, action, words):
    edit_config(release, action)
    before = (release / "config.json").read_bytes()
    shown = mxforge("config", release)
    assert shown.returncode == 1 and words in shown.stderr and len(shown.stderr.splitlines()) == 1, shown.stderr
    assert (release / "config.json").read_bytes() == before


def test_config_keeps_fixed_scales_of_fp8(tmp_path):
    """Activations that a checkpoint stores scales for must not become those that are scaled on the fly."""
    settings = convert("source=local", f"source.path={save('qwen3_moe', tmp_path / 'model', fp8=True)}", f"results={tmp_path / 'results'}")
    release = settings.run_directory / "release"
    (release / "manifest.json").unlink()

    def fixed(tensors):
        for name in [name for name in tensors if "self_attn" in name and name.endswith("_proj.weight")]:
            tensors |= {f"{name}_scale": torch.tensor([0.01]), name.replace("weight", "input_scale"): torch.tensor([0.02])}

    change(release, fixed, contains="lm_head.weight")
    static = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    edit_config(release, lambda c: [group.update(weights=dict(static), input_activations=dict(static)) for group in c["config_groups"].values()
                                    if group["format"] == "float-quantized"])
    right = (release / "config.json").read_text()
    edit_config(release, lambda c: c.update(ignore=[]))
    assert mxforge("config", release).returncode == 0
    assert json.loads((release / "config.json").read_text()) == json.loads(right)


EXPECTED = {"quantized_weights": 190_253_629_440, "release_tensor_bytes": 123_295_638_272, "source_tensor_bytes": 212_523_475_712,
            "release_tensors": 73_921}


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """Step-3.7-Flash-FP8: 26 files of 212.5 GB, nearly all of it holes."""
    directory = tmp_path_factory.mktemp("flash") / "checkpoint"
    write_checkpoint(directory)
    return directory


def test_plan_of_step37_flash_is_exact_and_needs_less_than_300_megabytes(flash):
    script = ("import re, sys\nfrom stages import command_line\ncommand_line.main()\n"
              "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n")
    ran = subprocess.run([sys.executable, "-c", script, "plan", str(flash), "--json"], cwd=PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert {key: made[key] for key in EXPECTED} == EXPECTED and sum(row["tensors"] for row in made["roles"]) == 1_597
    assert made["anomalies"] == ["the source's model.safetensors.index.json omits 126 tensors that its shards hold"]
    assert int(ran.stderr.split()[-1]) < 300_000


@pytest.mark.parametrize("revision", ["", "@main"])
def test_plan_of_a_hub_repository_resolves_its_revision_and_reads_headers_only(flash, revision):
    with HubServer(flash, "owner/flash", "a" * 40) as hub:
        ran = mxforge("plan", f"owner/flash{revision}", "--json", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
        assert ran.returncode == 0, ran.stderr
        made = json.loads(ran.stdout)
        assert {key: made[key] for key in EXPECTED} == EXPECTED and made["revision"] == "a" * 40
        shards = {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")}
        assert len(shards) == 26
        for name, count in shards.items():
            with open(flash / name, "rb") as file:
                header = 8 + int.from_bytes(file.read(8), "little")
            assert count <= header + 64 < 1_000_000, name  # the header, and nothing of the weights


def test_what_is_no_source_is_one_line():
    assert command_line.REPOSITORY.fullmatch("owner/name@refs/pr/1")["revision"] == "refs/pr/1"
    with pytest.raises(UserError, match="no hub repository"):
        command_line.settings_of("a/b/c", "mxfp4_experts", [], "results")
    for override in ("source.path=/etc", "results=/x", "recipe=other", "+source.path=/etc"):
        with pytest.raises(UserError, match="named by the command itself"):
            command_line.settings_of(str(TINY), "mxfp4_experts", [override], "results")
    with pytest.raises(UserError, match="choose one of"):
        command_line.settings_of(str(TINY), "null", [], "results")


def test_settings_of_a_plan_may_follow_its_options():
    for words in (("--json", "device.lane=4"), ("device.lane=4", "--json")):
        ran = mxforge("plan", TINY, *words)
        assert ran.returncode == 0 and json.loads(ran.stdout)["roles"], ran.stderr
    for words in (("--jason", "device.lane=4"), ("--json", "words")):
        ran = mxforge("plan", TINY, *words)
        assert ran.returncode == 2 and "unrecognized arguments: " + words[words[0] == "--json"] in ran.stderr


@pytest.mark.parametrize("name", ["it's", "a${b}", "back\\slash\\", "a, [b] = {c}", "with space"])
def test_plan_takes_any_directory_name(tmp_path, name):
    shutil.copytree(TINY, tmp_path / name)
    ran = mxforge("plan", tmp_path / name)
    assert ran.returncode == 0 and "653 tensors in 6 shards" in ran.stdout, ran.stderr


def test_a_download_of_a_release_may_hold_what_the_client_keeps_beside_it(release, converted):
    shutil.copy(converted.run_directory / "release" / "manifest.json", release)
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert mxforge("verify", release).returncode == 0
    (release / "notes.txt").write_text("x")
    shown = mxforge("verify", release)
    assert shown.returncode == 1 and "notes.txt" in shown.stdout


def test_what_installing_the_plugin_leaves_in_a_release_is_noted(release, converted):
    shutil.copy(converted.run_directory / "release" / "manifest.json", release)
    for name in ("build/lib/mxforge_vllm/cpu.py", "mxforge_vllm.egg-info/PKG-INFO", "mxforge_vllm/__pycache__/cpu.pyc"):
        (release / "vllm_plugin" / name).parent.mkdir(parents=True, exist_ok=True)
        (release / "vllm_plugin" / name).write_text("x")
    result = checkup.check(release, quick=True)
    assert result["passed"] and any("cpu.py and 2 more: left there by installing the plugin" in note for note in result["notes"]), result
    (release / "vllm_plugin" / "mxforge_vllm" / "other.py").write_text("x")
    assert "does not list vllm_plugin/mxforge_vllm/other.py" in faults(release, quick=True)["manifest"][0]


def test_a_config_is_made_from_the_sources_where_the_release_has_none(release):
    before, base = (release / "config.json").read_text(), release.parent / "base.json"
    base.write_text((TINY / "config.json").read_text())
    (release / "config.json").unlink()
    assert mxforge("verify", release).stderr == f"error: {release}/config.json is missing: complete the checkpoint, or make it from the source's with " \
        f"`mxforge config {release} --base SOURCE/config.json`\n"
    assert mxforge("config", release, "--base", base).returncode == 0
    assert json.loads((release / "config.json").read_text()) == json.loads(before) and mxforge("verify", release).returncode == 0


def test_a_source_of_conf_is_planned_by_its_name():
    shown = mxforge("plan", "step37_tiny")
    assert shown.returncode == 0 and shown.stdout.startswith("step37_tiny: Step3p7ForConditionalGeneration")


def test_a_reader_that_has_seen_enough_is_no_error():
    shown = subprocess.run(f"{sys.executable} -m stages.command_line plan {TINY} --json | head -c 10", shell=True, cwd=PROJECT,
                           capture_output=True, text=True)
    assert shown.stderr == ""


def test_an_installed_wheel_has_all_that_the_commands_need(tmp_path):
    project = tmp_path / "project"  # building leaves directories behind
    for name in ("stages", "kernels", "conf"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, project)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", tmp_path,
                    project], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    run = subprocess.run([sys.executable, "-m", "stages.command_line", "plan", TINY], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})
    assert run.returncode == 0 and re.search(r"^routed_experts +mxfp4", run.stdout, re.M), run.stdout + run.stderr


@pytest.mark.parametrize(("before", "after"), [("model.embed_tokens", "model.word_embeddings"), ("model.embed_tokens", "backbone.embeddings")])
def test_a_sound_checkpoint_of_another_architecture_may_name_its_embedding_as_it_likes(release, before, after):
    for path in release.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name.replace(before, after): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    for name in ("model.safetensors.index.json", "config.json"):
        text = (release / name).read_text()
        (release / name).write_text(text.replace(before, after).replace("Step3p7ForConditionalGeneration", "OtherForCausalLM"))
    config = json.loads((release / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head", r"re:.*(self_attn|mlp|share_expert|gate|vision_model|vit_large|eh_proj|transformer).*"]
    (release / "config.json").write_text(json.dumps(config))
    result = checkup.check(release, quick=True)
    assert not [fault for row in result["checks"] for fault in row["faults"] if "mbedding" in fault], result
