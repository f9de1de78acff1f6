"""What users get wrong and disks get wrong: one line that says what, where and what to do; nothing half-written."""

import hashlib
import errno
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import checkup, inspect_format, plan, validate_gemm
from stages.assemble_release import run as assemble
from stages.checkpoint.files import sha256_file
from stages.checkup import configuring
from stages.download import fetch_metadata
from stages.errors import UserError
from stages.planning.record import read_plan
from stages.release import REPORTS
from stages.serving import environment
from stages.settings import gemm_sizes, load, scoring, text_path
from stages.stale_results import of_other_settings, refuse_damaged
from stages.verify_release import run as verify
from tests.conftest import PROJECT, convert, copy_of

METADATA = {"format": "pt"}


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=METADATA)


def missing_shard(checkpoint):
    (checkpoint / "model-00003.safetensors").unlink()


def truncated_shard(checkpoint):
    path = checkpoint / "model-00003.safetensors"
    os.truncate(path, path.stat().st_size - 4096)


def trailing_bytes(checkpoint):
    with open(checkpoint / "model-00003.safetensors", "ab") as file:
        file.write(b"\0" * 100)


def lfs_pointer(checkpoint):
    (checkpoint / "model-00003.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4485680\n")


def dangling_link(checkpoint):
    (checkpoint / "model-00003.safetensors").unlink()
    (checkpoint / "model-00003.safetensors").symlink_to("/nonexistent")


def empty_shard(checkpoint):
    (checkpoint / "model-00003.safetensors").write_bytes(b"")


def index_names_an_absent_file(checkpoint):
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.99.mlp.up_proj.weight"] = "model-00099.safetensors"
    path.write_text(json.dumps(index))


def scale_missing(checkpoint):
    rewrite(checkpoint / "model-00003.safetensors",
            lambda tensors: tensors.pop("model.layers.3.moe.up_proj.weight_scale_inv"))


def nan_in_scales(checkpoint):
    def change(tensors):
        tensors["model.layers.3.moe.up_proj.weight_scale_inv"][5, 0, 1] = float("nan")
    rewrite(checkpoint / "model-00003.safetensors", change)


def nan_code(checkpoint):
    def change(tensors):
        tensors["model.layers.4.moe.down_proj.weight"].view(torch.uint8)[2, 17, 33] = 0x7F
    rewrite(checkpoint / "model-00003.safetensors", change)


def negative_scale(checkpoint):
    def change(tensors):
        tensors["model.layers.3.moe.gate_proj.weight_scale_inv"][0, 0, 0] *= -1
    rewrite(checkpoint / "model-00003.safetensors", change)


def scale_of_another_shape(checkpoint):
    def change(tensors):
        tensors["model.layers.3.moe.up_proj.weight_scale_inv"] = torch.ones(16, 1, 3)
    rewrite(checkpoint / "model-00003.safetensors", change)


def config_forgot_the_quantization(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config")
    path.write_text(json.dumps(config))


def config_missing(checkpoint):
    (checkpoint / "config.json").unlink()


def edit_text_config(checkpoint, **fields):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= fields
    path.write_text(json.dumps(config))


def config_counts_drafts_in_words(checkpoint):
    edit_text_config(checkpoint, num_nextn_predict_layers="three")


def without_index(checkpoint):
    """A source may come without one; then nothing but the config says what should be there."""
    (checkpoint / "model.safetensors.index.json").unlink()


def two_layers_gone(checkpoint):
    without_index(checkpoint)
    missing_shard(checkpoint)


def attention_of_a_layer_gone(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00003.safetensors", lambda tensors: tensors.pop("model.layers.3.self_attn.o_proj.weight"))


def experts_of_a_layer_gone(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00003.safetensors",
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3.moe." in name and "_proj." in name])


def layers_more_than_counted(checkpoint):
    edit_text_config(checkpoint, num_hidden_layers=5)


def layers_less_than_counted(checkpoint):
    edit_text_config(checkpoint, num_hidden_layers=10**12)


def head_gone(checkpoint):
    without_index(checkpoint)
    edit_text_config(checkpoint, tie_word_embeddings=False)
    rewrite(checkpoint / "model-00005.safetensors", lambda tensors: tensors.pop("lm_head.weight"))


def embedding_gone(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00005.safetensors", lambda tensors: tensors.pop("model.embed_tokens.weight"))


def final_norm_gone(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00005.safetensors", lambda tensors: tensors.pop("model.norm.weight"))


def odd_tensor_among_the_experts(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00003.safetensors",
            lambda tensors: tensors.update({"model.layers.3.moe.gate_proj.bias": torch.zeros(16, 64)}))


def nan_in_a_weight_that_passes_through(checkpoint):
    def change(tensors):
        tensors["model.layers.3.self_attn.o_proj.weight"][3, 5] = float("nan")
    rewrite(checkpoint / "model-00003.safetensors", change)


def infinity_in_a_norm(checkpoint):
    def change(tensors):
        tensors["model.layers.3.input_layernorm.weight"][7] = float("inf")
    rewrite(checkpoint / "model-00003.safetensors", change)


def scales_that_divide(checkpoint):
    def change(tensors):
        tensors["model.layers.3.moe.up_proj.weight_scale_inv"].reciprocal_()
    rewrite(checkpoint / "model-00003.safetensors", change)


def huge_plain_experts(checkpoint):
    def change(tensors):
        del tensors["model.layers.3.moe.up_proj.weight_scale_inv"]
        weight = tensors["model.layers.3.moe.up_proj.weight"]
        tensors["model.layers.3.moe.up_proj.weight"] = weight.bfloat16() * 2.0**20
    without_index(checkpoint)
    rewrite(checkpoint / "model-00003.safetensors", change)


def name_with_a_line_break(checkpoint):
    without_index(checkpoint)
    rewrite(checkpoint / "model-00003.safetensors", lambda tensors: tensors.update({'a b"\n\t.weight': torch.zeros(4, 4)}))


def half_a_surrogate_pair_in_the_config(checkpoint):
    edit_text_config(checkpoint, note="\ud800")  # which Python's json writes as an escape


def config_is_not_json(checkpoint):
    (checkpoint / "config.json").write_text("{")


def tensor_in_two_shards(checkpoint):
    shutil.copy(checkpoint / "model-00001.safetensors", checkpoint / "model-00009.safetensors")


def overlapping_offsets(checkpoint):
    path = checkpoint / "model-00001.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])


@pytest.mark.parametrize(("damage", "words"), [
    (missing_shard, ["model-00003.safetensors"]),
    (truncated_shard, ["model-00003.safetensors"]),
    (trailing_bytes, ["model-00003.safetensors"]),
    (lfs_pointer, ["model-00003.safetensors", "LFS"]),
    (dangling_link, ["model-00003.safetensors", "missing"]),
    (empty_shard, ["model-00003.safetensors"]),
    (index_names_an_absent_file, ["model-00099.safetensors"]),
    (scale_missing, ["model.layers.3.moe.up_proj.weight", "scale"]),
    (nan_in_scales, ["model-00003", "model.layers.3.moe.up_proj.weight_scale_inv", "[5, 0, 1]"]),
    (nan_code, ["model-00003", "model.layers.4.moe.down_proj.weight", "[2, 17, 33]"]),
    (negative_scale, ["model.layers.3.moe.gate_proj.weight_scale_inv", "[0, 0, 0]"]),
    (scale_of_another_shape, ["[16, 1, 3]", "[16, 1, 2]"]),
    (config_forgot_the_quantization, ["config.json", "block-FP8"]),
    (config_missing, ["config.json"]),
    (config_is_not_json, ["config.json"]),
    (half_a_surrogate_pair_in_the_config, ["config.json", "surrogates not allowed"]),
    (config_counts_drafts_in_words, ["config.json", "num_nextn_predict_layers is 'three'"]),
    (two_layers_gone, ["layer 3", "no shard holds anything of it", "6 layers"]),
    (attention_of_a_layer_gone, ["layer 3", "self_attn.o_proj.weight"]),
    (experts_of_a_layer_gone, ["layer 3", "moe."]),
    (layers_more_than_counted, ["layer 8", "5 layers and 3 draft layers"]),
    (layers_less_than_counted, ["layer 9", "no shard holds anything of it"]),
    (head_gone, ["lm_head.weight"]),
    (embedding_gone, ["embed_tokens.weight"]),
    (final_norm_gone, ["norm.weight"]),
    (odd_tensor_among_the_experts, ["model.layers.3.moe.gate_proj.bias"]),
    (nan_in_a_weight_that_passes_through, ["model.layers.3.self_attn.o_proj.weight[3, 5]"]),
    (infinity_in_a_norm, ["model.layers.3.input_layernorm.weight[7]"]),
    (scales_that_divide, ["model.layers.3.moe.up_proj.weight[0] decodes to weights of", "its scales are not those of block_fp8"]),
    (huge_plain_experts, ["model.layers.3.moe.up_proj.weight[0] decodes to weights of", "the source is damaged"]),
    (tensor_in_two_shards, ["two shards", "model-00009.safetensors"]),
    (overlapping_offsets, ["model-00001.safetensors"]),
])
def test_a_damaged_source_is_refused_in_one_line_and_makes_no_release(checkpoint, local, damage, words):
    damage(checkpoint)
    with pytest.raises(UserError) as caught:
        convert(*local)
    message = str(caught.value)
    assert all(word in message for word in words), message
    run_directory = load(local).run_directory
    assert not (run_directory / "release").exists()
    assert not list(run_directory.rglob("*.part*"))


def test_numbers_that_only_pythons_json_knows_stay_in_the_config(checkpoint, local, capsys):
    edit_text_config(checkpoint, time_step_limit=[0.0, float("inf")], note=float("nan"))
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace("NaN", "-1e400"))
    settings = convert(*local)
    release = settings.run_directory / "release"
    text = (release / "config.json").read_text()
    found = json.loads(text)["text_config"]
    assert (found["time_step_limit"], found["note"]) == ([0.0, float("inf")], float("-inf"))
    configuring.run(release, None, dry_run=False)
    assert "is right as it is" in capsys.readouterr().out and checkup.check(release, checkpoint, quick=True)["passed"]
    edit_text_config(checkpoint, note=float("nan"))
    convert(*local)
    assert (release / "config.json").read_text() == text.replace("-Infinity", "NaN")


def test_a_listing_of_other_files_of_a_local_source_or_of_an_older_version_is_known(checkpoint, local):
    settings = load(local)
    fetch_metadata(settings)
    path = settings.source_directory / "listing.json"
    assert of_other_settings(settings) == []
    found = json.loads(path.read_text())
    for entry in found["files"].values():
        del entry["mtime_ns"]
    path.write_text(json.dumps(found))
    assert of_other_settings(settings) == [path]
    fetch_metadata(settings)
    os.utime(checkpoint / "model-00003.safetensors", (1.6e9, 1.6e9))
    assert of_other_settings(settings) == [path]


@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_output_equal_to_inside_or_around_the_source_is_refused(checkpoint, where):
    results = {"same": checkpoint, "inside": checkpoint / "out", "around": checkpoint.parent}[where]
    name = {"around": checkpoint.name}.get(where, "x")
    before = sorted(path.name for path in checkpoint.iterdir())
    with pytest.raises(UserError) as caught:
        convert("source=local", f"source.path={checkpoint}", f"results={results}", f"source.name={name}")
    assert str(checkpoint) in str(caught.value)
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_a_file_system_without_hard_links_is_told_before_the_first_byte(local, monkeypatch):
    def refused(*arguments, **keywords):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UserError, match="cannot be linked into .* hard links"):
        convert(*local)
    assert not list(load(local).run_directory.glob("shards/*")) and not list(load(local).run_directory.glob(".link"))


def test_a_full_disk_is_told_before_the_first_byte(local, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"(?i)disk|space"):
        convert(*local)
    assert not list(load(local).run_directory.glob("shards/*.safetensors"))


def test_shards_that_a_release_keeps_are_not_counted_as_space_that_will_be_free(local, monkeypatch):
    settings = convert(*local)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"not enough disk: the whole run.*; remove \S*/release, which keeps 18\.\d+ MB of the shards before"):
        plan.run(settings)
    shutil.rmtree(settings.run_directory / "release")  # as the line says
    plan.run(settings)


def stage(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"stages.{name}", *arguments], cwd=PROJECT, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("plan", ["results=/nonexistent"], ["inspect.json", "run inspect_format first"]),
    ("quantize_experts", ["recipe=mxfp5", "--shard", "x"], ["no recipe 'mxfp5'"]),
    ("verify_release", ["results=/nonexistent"], ["plan.json", "run plan first"]),
    ("inspect_format", ["results=/nonexistent"], ["headers.json"]),
    ("evaluate", ["evaluation.txt=x"], ["evaluation.txt", "evaluation.text"]),
])
def test_a_stage_run_alone_answers_a_mistake_with_one_line_and_no_traceback(name, arguments, words):
    ran = stage(name, *arguments)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert all(word in ran.stderr for word in words), ran.stderr


@pytest.mark.parametrize("name", ["download", "inspect_format", "plan", "quantize_experts", "validate_gemm",
                                  "assemble_release", "verify_release", "evaluate", "serve_bench", "report"])
def test_every_stage_explains_itself(name):
    ran = stage(name, "--help")
    assert ran.returncode == 0 and "KEY=VALUE" in ran.stdout and len(ran.stdout.splitlines()) > 8


# --- damage to a finished release -----------------------------------------------------------------------------------


@pytest.fixture
def finished(converted, tmp_path):
    """A private copy of the converted tiny model, shards as files of their own."""
    return copy_of(converted, f"results={tmp_path / 'copy'}")


def flip_passthrough_bit(release):
    path = release / "model-00005.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def drop_expert(release):
    rewrite(release / "model-00002.safetensors", lambda t: t.pop("model.layers.1.moe.experts.3.up_proj.weight_scale"))


def add_tensor(release):
    rewrite(release / "model-00002.safetensors", lambda t: t.update(extra=torch.zeros(3)))


def rename_suffix(release):
    def change(tensors):
        tensors["model.layers.1.moe.experts.3.up_proj.scale"] = tensors.pop(
            "model.layers.1.moe.experts.3.up_proj.weight_scale")
    rewrite(release / "model-00002.safetensors", change)


def swap_gate_and_up(release):
    def change(tensors):
        a, b = (f"model.layers.1.moe.experts.3.{p}_proj.weight_packed" for p in ("gate", "up"))
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    rewrite(release / "model-00002.safetensors", change)


def scales_off_by_one(release):
    def change(tensors):
        tensors["model.layers.2.moe.experts.0.down_proj.weight_scale"] += 1
    rewrite(release / "model-00002.safetensors", change)


def wrong_total_size(release):
    path = release / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"total_size": ', '"total_size": 1'))


def config_target_hits_nothing(release):
    path = release / "config.json"
    path.write_text(path.read_text().replace("re:.*", "re:"))


def missing_tokenizer(release):
    (release / "tokenizer.json").unlink()


def stray_file(release):
    (release / "notes.txt").write_text("x")


@pytest.mark.parametrize(("damage", "check"), [
    (flip_passthrough_bit, "passthrough"), (drop_expert, "tensors"), (add_tensor, "tensors"), (rename_suffix, "tensors"),
    (swap_gate_and_up, "quantized"), (scales_off_by_one, "quantized"), (wrong_total_size, "index"),
    (config_target_hits_nothing, "config"), (missing_tokenizer, "auxiliary"), (stray_file, "files"),
])
def test_a_damaged_release_fails_the_check_that_is_meant_for_it(finished, damage, check):
    unlinked(finished)
    damage(finished.run_directory / "release")
    assert check in failing(finished)


def unlinked(settings):
    """Files of the release become its own: damage then leaves the shards alone that are linked into it."""
    for path in (settings.run_directory / "release").iterdir():
        if path.is_file():
            path.write_bytes((lambda data: path.unlink() or data)(path.read_bytes()))


def failing(settings) -> set[str]:
    """The checks that fail."""
    with pytest.raises(UserError):
        verify(settings)
    rows = json.loads((settings.run_directory / "verify.failed.json").read_text())["checks"]
    return {row["check"] for row in rows if not row["passed"]}


def swap_nibbles(tensors):
    codes = tensors["model.layers.1.moe.experts.3.up_proj.weight_packed"]
    codes.copy_((codes >> 4) | (codes << 4))


def flip_signs(tensors):
    tensors["model.layers.1.moe.experts.3.up_proj.weight_packed"] ^= 0x88


@pytest.mark.parametrize("damage", [swap_nibbles, flip_signs])
def test_a_manifest_that_fits_the_damage_does_not_hide_it(finished, damage):
    unlinked(finished)
    release, shard = finished.run_directory / "release", "model-00002.safetensors"
    rewrite(release / shard, damage)
    manifest = json.loads((release / "manifest.json").read_text())
    manifest["files"][shard]["sha256"] = hashlib.sha256((release / shard).read_bytes()).hexdigest()
    (release / "manifest.json").write_text(json.dumps(manifest, indent=2))
    assert failing(finished) == {"files"}


@pytest.mark.parametrize("change", [
    lambda manifest: manifest["source"].update(revision="0" * 40), lambda manifest: manifest["recipe"].update(exponent_rule="even"),
    lambda manifest: manifest["tensors"].popitem(), lambda manifest: manifest["source"]["shards"].update({"model-00002.safetensors": "0" * 64}),
])
def test_a_manifest_that_says_something_else_than_plan_and_receipts_is_found(finished, change):
    unlinked(finished)
    path = finished.run_directory / "release" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=2))
    assert failing(finished) == {"files"}


def test_a_file_of_another_size_than_it_was_made_with_is_found_without_reading_it(finished):
    unlinked(finished)
    refuse_damaged(finished)
    for name in ("release/tokenizer.json", "release/model-00003.safetensors", "shards/model-00003.safetensors"):
        path = finished.run_directory / name
        before = path.read_bytes()
        path.write_bytes(before[:1000])
        with pytest.raises(UserError, match=f"{name}: has not the size that"):
            refuse_damaged(finished)
        path.write_bytes(before)
    (finished.run_directory / "release/tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: is missing; remove"):
        refuse_damaged(finished)


@pytest.mark.parametrize(("name", "change"), [
    ("gemm.json", {"sizes": [1, 1]}), ("serving.json", {"server": "endpoint"}), ("serving.json", {"settings": {}}),
    ("perplexity.json", {"text": {"sha256": "0"}}), ("perplexity.json", {"settings": {}})])
def test_results_of_other_settings_are_known(finished, name, change):
    path, evaluation = finished.run_directory / name, finished.evaluation
    found = {"gemm.json": {"sizes": gemm_sizes(evaluation)}, "serving.json": {"server": finished.serving.name},
             "perplexity.json": {"settings": scoring(evaluation), "text": {"sha256": sha256_file(text_path(finished))}}}[name]
    path.write_text(json.dumps(found))
    assert of_other_settings(finished) == []
    path.write_text(json.dumps(found | change))
    assert of_other_settings(finished) == [path]


def test_files_that_the_manifest_was_changed_to_fit_are_found(finished):
    """The plugin is code that a server runs."""
    unlinked(finished)
    release = finished.run_directory / "release"
    manifest = json.loads((release / "manifest.json").read_text())
    for name in ("evil.py", "vllm_plugin/mxforge_vllm/drafts.py", "tokenizer.json"):
        (release / name).write_text("print('hello')\n")
        manifest["files"][name] = {"bytes": 15, "sha256": hashlib.sha256(b"print('hello')\n").hexdigest()}
    (release / "manifest.json").write_text(json.dumps(manifest, indent=2))
    with pytest.raises(UserError):
        verify(finished)
    faults = {row["check"]: row["faults"] for row in json.loads((finished.run_directory / "verify.failed.json").read_text())["checks"]}
    assert any(fault.startswith("evil.py: does not belong") for fault in faults["files"])
    assert {fault.split(":")[0] for fault in faults["auxiliary"]} == {"tokenizer.json", "vllm_plugin/mxforge_vllm/drafts.py"}
    assert not (finished.run_directory / "verify.json").exists()


def test_a_plan_of_other_settings_is_not_gone_on_with(finished):
    for change in ("recipe.exponent_rule=even", "release.draft_scales=true"):
        other = load(["source=local", f"source.path={finished.source.path}", f"results={finished.results}", f"source.name={finished.source.name}", change])
        with pytest.raises(UserError, match="was made for other settings"):
            verify(other)


@pytest.mark.parametrize(("name", "reader"), [("inspect.json", plan.run), ("plan.json", read_plan)])
def test_a_result_that_lacks_something_is_one_line(finished, name, reader):
    path = finished.run_directory / name
    whole = json.loads(path.read_text())
    tensor = next(iter(whole["tensors"]))
    nullable = ("architecture", "hidden_size", "experts", "tower_blocks") if name == "inspect.json" else ()
    unread = {"dtypes", "bytes_by_role", "file_bytes"} if name == "inspect.json" else set()
    path.write_text(json.dumps({key: value for key, value in whole.items() if key not in unread}))
    reader(finished)
    for key in whole.keys() - unread:
        lacking = {other: value for other, value in whole.items() if other != key}
        for damaged in (lacking, *([] if key in nullable else [lacking | {key: None}]), lacking | {key: 1.5}):
            path.write_text(json.dumps(damaged))
            with pytest.raises(UserError, match=f"{name}.* (is damaged|was made)"):
                reader(finished)
    for entry in (None, {key: value for key, value in whole["tensors"][tensor].items() if key != "matrix"}):
        path.write_text(json.dumps(whole | {"tensors": whole["tensors"] | {tensor: entry}}))
        with pytest.raises(UserError, match=f"{tensor} is missing or of another form"):
            reader(finished)
    path.write_text(json.dumps(whole))
    reader(finished)


@pytest.mark.parametrize("record", [
    None, {}, [], *({"file_size": 1, "metadata": None, "tensors": tensors} for tensors in (None, [], {"x": []}, {"x": ["BF16", None, 0, 0]}))])
def test_headers_that_lack_something_are_one_line(finished, record):
    path = finished.source_directory / "headers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model-00003.safetensors": record}))
    with pytest.raises(UserError, match=r"headers\.json is damaged"):
        inspect_format.run(finished)


def test_an_environment_that_was_not_made_here_is_not_installed_into(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("")
    with pytest.raises(UserError, match="was not made here"):
        environment.build(tmp_path)
    assert environment.marker_inputs(load(["serving=vllm_cuda", f"serving.environment={tmp_path}"]).serving) == []


def test_a_kernel_that_gives_no_numbers_is_no_traceback():
    truth = torch.ones(2, 2, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        assert validate_gemm.signal_to_noise_db(torch.full((2, 2), value), truth) == -300


def test_a_report_does_not_stay_beside_a_release_that_it_is_not_of(finished):
    reports = [finished.run_directory / name for name in REPORTS]
    for path in reports:
        path.write_text("proven")
    assemble(finished)
    assert all(path.exists() for path in reports), "the release is the same"
    (finished.run_directory / "release" / "manifest.json").write_text("{}")
    assemble(finished)
    assert not any(path.exists() for path in reports)


def test_assembling_with_a_shard_of_another_plan_is_refused(finished):
    path = finished.run_directory / "shards" / "model-00002.json"
    receipt = json.loads(path.read_text())
    receipt["plan_sha256"] = "0" * 64
    path.write_text(json.dumps(receipt))
    with pytest.raises(UserError, match="another plan"):
        assemble(finished)
