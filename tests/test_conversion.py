"""The tiny release end to end: proven against the libraries that users will read it with."""

import hashlib
import html
import json
import math
import mmap
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels import mxfp4
from kernels.fp8 import decode_block_fp8
from stages import assemble_release, download, evaluate, inspect_format, plan, quantize_experts, receipts, report, serve_bench, validate_gemm, verify_release
from stages.checkpoint.files import read_json, sha256_file, write_json
from stages.checkpoint.header import render_header, sorted_specs
from stages.conversion import quantizer
from stages.conversion.places import TensorInMemory
from stages.dialects import Claim
from stages.dialects.reading import Tensors, stored_rows
from stages.errors import UserError
from stages.models import step37
from stages.planning.record import read_plan
from stages.planning.view import where_it_runs
from stages.release import measured_release
from stages.serving import launcher, score
from stages.serving.commands import chat_flags, client_example, serve_commands, served_by, thinks
from stages.serving.load import Events
from stages.serving.statistics import save as save_events
from stages.settings import as_dict, load
from stages.settings.schema import FEWEST_TOKENS
from tests.conftest import PROJECT, TINY, convert, copy_of, planned
from tests.hub_server import HubServer
from tests.small_models import save


def release_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(tensor.untyped_storage())


def test_everything_unquantized_is_bit_identical_to_the_source(converted):
    source, release = release_tensors(TINY), release_tensors(converted.run_directory / "release")
    kept = [name for name in source if ".moe." not in name or "gate.weight" in name or "router_bias" in name]
    assert len(kept) == 173
    for name in kept:
        assert release[name].dtype == source[name].dtype and raw_bytes(release[name]) == raw_bytes(source[name]), name
    assert {n for n in release if not n.endswith(("weight_packed", "weight_scale"))} == set(kept)


def test_the_index_names_every_tensor_and_counts_their_true_bytes(converted):
    release = converted.run_directory / "release"
    index = json.loads((release / "model.safetensors.index.json").read_text())
    tensors = release_tensors(release)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for shard in set(index["weight_map"].values()):
        with safe_open(release / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}


def test_compressed_tensors_decompresses_our_experts_to_the_same_bits(converted):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((converted.run_directory / "release" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=group["targets"], weights=group["weights"], format=group["format"])
    tensors = release_tensors(converted.run_directory / "release")
    packed_names = [name for name in tensors if name.endswith("weight_packed")]
    assert len(packed_names) == 240
    for name in packed_names:
        packed, scale = tensors[name], tensors[name.replace("weight_packed", "weight_scale")]
        theirs = MXFP4PackedCompressor.decompress(
            {"weight_packed": packed.clone(), "weight_scale": scale.clone()}, scheme=scheme)["weight"]
        ours = mxfp4.dequantize(packed, scale, theirs.dtype)
        assert torch.equal(ours.view(torch.int16 if ours.element_size() == 2 else torch.int32),
                           theirs.view(torch.int16 if ours.element_size() == 2 else torch.int32)), name


def test_the_bytes_are_those_of_the_reference_quantizer(converted):
    source, release = release_tensors(TINY), release_tensors(converted.run_directory / "release")
    for layer, projection in ((1, "gate"), (3, "down"), (5, "up")):
        name = f"model.layers.{layer}.moe.{projection}_proj.weight"
        made = mxfp4.quantize(source[name], source[name + "_scale_inv"], rule="mse", backend="reference")
        for expert in range(16):
            stem = f"model.layers.{layer}.moe.experts.{expert}.{projection}_proj.weight"
            assert torch.equal(release[stem + "_packed"], made.packed[expert])
            assert torch.equal(release[stem + "_scale"], made.scale[expert])


def test_stacked_layout_holds_the_same_bytes_in_three_dimensions(converted, tmp_path):
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", "recipe=mxfp4_experts_stacked")
    single, stacked = (release_tensors(s.run_directory / "release") for s in (converted, settings))
    name = "model.layers.2.moe.up_proj.weight_packed"
    assert stacked[name].shape == (16, 128, 128)
    for expert in range(16):
        assert torch.equal(stacked[name][expert], single[f"model.layers.2.moe.experts.{expert}.up_proj.weight_packed"])
    assert verify_release.run(settings)["passed"]


@pytest.mark.parametrize("overrides", [
    ["recipe.groups=[{roles: [routed_experts, attention, dense_mlp, shared_experts]}]"],
    ["recipe.exponent_rule=ocp_floor"], ["recipe.exponent_rule=even"], ["recipe.exponent_rule=rceil"],
])
def test_other_recipes_make_proven_releases_that_load(tmp_path, overrides):
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", *overrides)
    _, _, loading = step37.load(settings.run_directory / "release", torch.float32)
    assert loading == {"missing": 0, "unexpected": 0}


def expand(release: Path, directory: Path, dtype: torch.dtype) -> None:
    """Saves a release's values as an unquantized checkpoint."""
    save_file({name: tensor.contiguous() for name, tensor in step37.expanded_tensors(release, dtype)}, directory / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((release / "config.json").read_text())
    config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))


def test_release_scores_bit_for_bit_like_the_same_values_expanded_to_bf16(converted, tmp_path):
    """The engine-side claim: nothing about the packed layout changes a single log-probability."""
    release = converted.run_directory / "release"
    expand(release, tmp_path, torch.bfloat16)
    tokens = evaluate.tokens_of((PROJECT / "tests/tiny/held_out.txt").read_text(), release, 120)
    for dtype in ("bfloat16", "float32"):
        (packed, packed_drafts), (plain, plain_drafts) = (evaluate.Scorer(path, dtype)(tokens) for path in (release, tmp_path))
        assert torch.equal(packed, plain)
        assert all(torch.equal(a, b) for a, b in zip(packed_drafts, plain_drafts))


def test_transformers_itself_loads_the_expanded_checkpoint_without_a_missing_key(converted, tmp_path):
    """Our loader and transformers' own from_pretrained on files must agree, or our perplexities mean nothing."""
    from transformers import Step3p7ForConditionalGeneration

    release = converted.run_directory / "release"
    expand(release, tmp_path, torch.float32)
    model, info = Step3p7ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = evaluate.tokens_of("The river rises in the hills.", release, None)
    ours, _ = evaluate.Scorer(release, "float32")(tokens)
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
    assert torch.equal(ours, theirs)


def test_a_release_with_an_expert_missing_is_not_scored(converted, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted.run_directory / "release", broken)
    tensors = load_file(broken / "model-00003.safetensors")
    for part in ("packed", "scale"):
        for expert in range(16):
            tensors.pop(f"model.layers.3.moe.experts.{expert}.up_proj.weight_{part}")
    save_file(tensors, broken / "model-00003.safetensors")
    with pytest.raises(UserError, match="does not fill the model"):
        step37.load(broken, torch.float32)


def test_evaluation_gemm_report_and_card_hold_the_measured_figures(converted, tmp_path):
    settings = copy_of(converted, f"results={tmp_path}", "serving=none")
    quality = evaluate.run(settings)
    noise = read_json(settings.run_directory / "sqnr.json", "evaluate")
    assert 18.5 < noise["overall_db"] < 19.6 and noise["matrices"] == 240
    assert quality["source"]["perplexity"] < 51.2  # a tenth of the vocabulary
    assert quality["release"]["perplexity"] == pytest.approx(quality["source"]["perplexity"], rel=0.05)
    assert quality["release"]["tokens"] == quality["text"]["tokens"] - 1
    assert all(rate > 0.5 for rate in quality["release"]["draft_agreement"])
    assert 0 < quality["divergence"]["mean_kl_nats"] < 0.05 and 0 < quality["divergence"]["standard_error_nats"] < quality["divergence"]["mean_kl_nats"]
    tail = [quality["divergence"][name] for name in ("99th_percentile_kl_nats", "99.9th_percentile_kl_nats", "maximum_kl_nats")]
    assert 0 < tail[0] < tail[1] < tail[2]
    paired = quality["paired"]
    assert paired["perplexity_ratio"] == pytest.approx(quality["release"]["perplexity"] / quality["source"]["perplexity"])
    assert 0 < paired["standard_error"] < 0.1 * quality["release"]["standard_error"] / quality["source"]["perplexity"], "the text's share cancels out"
    assert 0.9 < paired["same_top_token"] < 1 and 0 < paired["same_top_token_standard_error"] < 0.01
    gemm = validate_gemm.run(settings)
    assert {row["path"] for row in gemm["rows"]} == {"linear", "grouped_experts"}
    assert all(row["arithmetic_db"] >= 45 and 17 < row["format_db"] < 22 for row in gemm["rows"])
    serve_bench.run(settings)
    report.run(settings)
    page = (settings.run_directory / "report.html").read_text()
    assert f"{noise['overall_db']:.2f} dB" in page and f"{quality['release']['perplexity']:.4f}" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", "") and "<script src" not in page
    card = (settings.run_directory / "card.md").read_text()
    assert f"{quality['release']['perplexity']:.4f}" in card and "step37_tiny" in card
    for text in (page, card):
        assert f"{paired['standard_error']:.4f}" in text and "standard error" in text and "teacher-forced; not acceptance" in text
        assert all(words in text for words in ("tokens of held_out.txt", "sha256 43054d46c20b", "windows of 256 tokens, 128 of them new",
                                               "in process in float32", "BOS token before its first"))
    assert "A Step-3.7 model small enough for a repository" in card  # the source's own card, below
    for text in (page, card):
        assert "index.json omits 15 tensors" in text and "not tensor parallel 8, 16" in text and "transformers: no" in text


@pytest.mark.parametrize(("minimum", "words"), [("ARITHMETIC", "the kernel is wrong on this machine"), ("FORMAT", "remove shards/model-00002.safetensors")])
def test_a_product_that_is_wrong_is_told_with_all_figures(converted, tmp_path, monkeypatch, minimum, words):
    settings = copy_of(converted, f"results={tmp_path}", "evaluation.gemm_tensors=1", "evaluation.gemm_tokens=4")
    with monkeypatch.context() as patched:
        patched.setattr(validate_gemm, f"MINIMUM_{minimum}_DB", 1000.0)
        with pytest.raises(UserError, match=words):
            validate_gemm.run(settings)
    assert read_json(settings.run_directory / "gemm.failed.json")["rows"] and not (settings.run_directory / "gemm.json").exists()
    validate_gemm.run(settings)
    assert not (settings.run_directory / "gemm.failed.json").exists()


@pytest.fixture(scope="module")
def proven(converted, tmp_path_factory):
    """A copy of the converted tiny model with all results, the perplexity left out; its release is no longer hard links."""
    settings = copy_of(converted, f"results={tmp_path_factory.mktemp('proven')}", "serving=none", "evaluation.memory_gb=0", "evaluation.gemm_tensors=1")
    for stage in (evaluate, validate_gemm, serve_bench, report):
        stage.run(settings)
    return settings


@pytest.mark.parametrize("known", [True, False])
def test_through_a_server_source_and_release_are_compared_token_by_token(converted, proven, monkeypatch, known):
    """And the card says what served them, or why the source was not measured."""
    @contextmanager
    def server(settings, directory):
        yield SimpleNamespace(of=directory.name, facts={"engine": "vllm", "version": "0.32.0", "on_cpu": False, "hardware": ["A GPU"], "command": ["vllm"]})

    def scored_tokens(running, tokens, windows):
        values = torch.full((sum(end - first for _, end, first in windows),), -1.5, dtype=torch.float64)
        picks = tokens[1:len(values) + 1].clone()
        if running.of == "release":
            values[::2] -= 0.01
            picks[:5] += 1
        return values, picks

    monkeypatch.setattr(launcher, "server", server)
    monkeypatch.setattr(score, "scored_tokens", scored_tokens)
    settings = load([f"results={converted.results}", f"source.path={TINY}", "serving=vllm_cuda" if known else "serving=endpoint", "evaluation.via=vllm",
                     *([] if known else ["serving.url=http://127.0.0.1:9"]), "evaluation.maximum_tokens=101"])
    quality = evaluate.perplexity(settings, read_plan(settings))
    assert quality["release"]["perplexity"] == pytest.approx(math.exp(1.505)) and quality["release"]["tokens"] == 100
    if known:
        paired = quality["paired"]
        assert paired["perplexity_ratio"] == pytest.approx(math.exp(0.005)) and paired["same_top_token"] == 0.95
        assert paired["same_top_token_standard_error"] == pytest.approx(math.sqrt(0.95 * 0.05 / 100))
        assert paired["standard_error_nats"] == pytest.approx(0.005 * math.sqrt(100 / 99) / 10)
    report._write(proven, report.facts(proven) | {"quality": quality, "scored_on": report.scored_on(quality)})
    for name in ("report.html", "card.md"):
        shown = (proven.run_directory / name).read_text()
        assert "windows of 256 tokens, 128 of them new in each; vLLM 0.32.0, 1 x A GPU" in shown and "standard error" in shown
        assert all(("The source was not measured: the endpoint serves the release only" in shown) != known and (words in shown) == known
                   for words in ("1.0050", "95.0"))
    report.run(proven)


@pytest.mark.parametrize("name, key, value, words", [
    *((name, "manifest_sha256", "0" * 64, f"{name}: was measured on another release .* run {stage} again") for name, stage in (
        ("verify.json", "verify_release"), ("sqnr.json", "evaluate"), ("perplexity.json", "evaluate"))),
    ("serving.json", "not_measured", None, "serving.json: was measured on another release .* run serve_bench again"),
    ("gemm.json", "shards_sha256", "0" * 64, "gemm.json: was measured on another release .* run validate_gemm again"),
    ("verify.json", "passed", False, "verify.json: does not say that the release passed; run verify_release again"),
])
def test_a_report_holds_no_result_of_another_release_and_none_that_did_not_pass(proven, name, key, value, words):
    path = proven.run_directory / name
    text, found = path.read_text(), read_json(path)
    found.pop(key)
    path.write_text(json.dumps(found | ({} if value is None else {key: value})))
    with pytest.raises(UserError, match=words):
        report.run(proven)
    path.write_text(text)
    report.run(proven)


def test_a_result_that_lacks_its_figures_is_no_traceback_of_the_report(proven):
    path = proven.run_directory / "gemm.json"
    text = path.read_text()
    path.write_text(json.dumps({"shards_sha256": json.loads(text)["shards_sha256"]}))
    with pytest.raises(UserError, match="one of its results is damaged"):
        report.run(proven)
    path.write_text(text)


@pytest.mark.parametrize("name", ["model-00003.safetensors", "config.json"])
def test_a_release_whose_files_were_replaced_is_neither_measured_nor_reported(proven, name):
    path = proven.run_directory / "release" / name
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for stage in (evaluate, report):
        with pytest.raises(UserError, match=f"{name}: is not the file that manifest.json lists; remove .*release and run again"):
            stage.run(proven)
    path.write_bytes(before)
    report.run(proven)


def test_a_release_that_dvc_has_taken_from_its_cache_is_on_the_disk_once_and_read_once(local, monkeypatch):
    settings = convert(*local)
    name = "model-00003.safetensors"
    made, path, cached = settings.run_directory / "shards" / name, settings.run_directory / "release" / name, settings.run_directory / "cached"
    shutil.copyfile(path, cached)
    os.utime(cached, (1.6e9, 1.6e9))
    cached.chmod(0o444)
    path.unlink()
    os.link(cached, path)
    before, digest, read = made.stat(), measured_release(settings), []
    assert made.samefile(cached) and made.stat().st_mtime_ns == before.st_mtime_ns, "Snakemake goes by its time"
    monkeypatch.setattr("stages.release.sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    assert measured_release(settings) == digest and name not in read
    monkeypatch.undo()
    receipt = made.with_suffix(".json")
    write_json(receipt, read_json(receipt) | {"output": {"bytes": before.st_size, "sha256": "0" * 64}})  # of a later conversion
    path.unlink()
    shutil.copyfile(cached, path)
    path.chmod(0o444)
    measured_release(settings)
    assert not made.samefile(path)


def test_weights_of_nothing_but_zeros_are_converted_and_named(local, checkpoint, capsys):
    tensors = load_file(checkpoint / "model-00004.safetensors")
    tensors["model.layers.5.moe.down_proj.weight"].view(torch.uint8)[3] = 0  # what a hole in a download leaves
    tensors["model.layers.5.self_attn.q_proj.weight"].zero_()
    tensors["model.layers.5.input_layernorm.weight"].zero_()  # a norm may be
    save_file(tensors, checkpoint / "model-00004.safetensors", metadata={"format": "pt"})
    settings = convert(*local)
    made = receipts.read_receipts(settings, read_plan(settings))
    zeros = ["model.layers.5.moe.down_proj.weight[3]", "model.layers.5.self_attn.q_proj.weight"]
    assert [receipt["zeros"] for receipt in made.values() if receipt["zeros"]] == [zeros]
    assert f"note: 2 weights hold nothing but zeros, in the source already ({', '.join(zeros)})" in capsys.readouterr().out


def test_a_card_keeps_the_licence_of_the_source(local, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: a-licence\nlicense_link: LICENSE\ntags: [x]\n---\n# A model\n")
    settings = load(local)
    download.fetch_metadata(settings)
    assert report.source_matter(settings) == "license: other\nlicense_name: a-licence\nlicense_link: LICENSE\n"
    assert report.source_card(settings) == "# A model\n"
    settings.source.license = "mit"
    assert report.source_matter(settings) == "license: mit\n"
    settings.source.license = None
    (settings.source_directory / "auxiliary/README.md").write_text(
        "---\nlanguage: [en, no]\nlicense: 1.10\nlicense_name: null\nlicense_link: {a: 1}\npipeline_tag: 2024-01-01\n---\n")
    assert yaml.safe_load(report.source_matter(settings)) == {"license": "1.10", "language": ["en", "no"], "pipeline_tag": "2024-01-01"}
    (settings.source_directory / "auxiliary/README.md").write_text("---\n: [\n---\nno YAML")
    assert report.source_matter(settings) == ""


def test_an_interrupted_proof_does_not_read_the_rest_of_the_release(converted, monkeypatch):
    begun, waited = threading.Event(), []

    def read(path, planned, schemes, source, stop):
        begun.set()
        waited.append(stop.wait(60))
        raise verify_release.Stopped

    def interrupted(verification):
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_release, "read_shard", read)
    monkeypatch.setattr(verify_release, "threads", lambda: 1)
    monkeypatch.setattr(verify_release.Verification, "CHECKS", (("files", "interrupted", interrupted),))
    with pytest.raises(KeyboardInterrupt):
        verify_release.Verification(converted).run()
    assert waited == [True], "one shard was being read, the others were not begun"


def test_commands_are_said_to_have_run_only_as_they_ran(converted):
    made, config = read_plan(converted), json.loads((converted.run_directory / "release" / "config.json").read_text())

    def rows(engine):
        """[plugin's, one GPU's] `run`, and the commands."""
        found = serve_commands(made, config, engine)
        return [next(row["run"] for row in found if row["title"].startswith(title)) for title in ("The plugin", "vLLM, one GPU")], \
            [row["command"] for row in found]

    assert rows({})[0] == ["not run", "not run"]
    assert rows({"engine": "endpoint", "version": "0.32.0"})[0] == ["not run", "not run"], "nobody knows how an endpoint was started"
    speculation = ["--speculative-config", '{"method":"mtp", "num_speculative_tokens":3}']
    address = ["--host", "127.0.0.1", "--port=40001"]
    drafting = {"engine": "vllm", "version": "0.32.0", "command": ["vllm", "serve", "results/a b/release", *address, *speculation]}
    assert rows(drafting)[0] == 2 * ["vLLM 0.32.0 on hardware that is not known"]
    drafting |= {"on_cpu": False}
    assert rows(drafting)[0] == ["vLLM 0.32.0", "vLLM 0.32.0"]
    assert rows(drafting | {"command": ["vllm", "serve", "."]})[0][1] == "not run", "without drafting"
    for flags in (["--tensor-parallel-size=2"], ["-tp", "2"], ["--tensor_parallel_size", "2"], ["--max-model-len", "8192"], ["--max-num-seqs=64"],
                  ["--gpu-memory-utilization", "0.95"], ["--quantization", "fp8"], ["-q", "fp8"], ["--dtype", "float16"], ["--kv-cache-dtype", "fp8"],
                  ["-pp", "2"], ["--data-parallel-size", "2"], ["-ep"], ["--speculative-config", '{"method": "ngram"}'],
                  ["--speculative-config.num_speculative_tokens", "1"]):
        other = drafting | {"command": [*drafting["command"], *flags]}
        assert rows(other)[0][1] == "not run", flags
        started = next(command for command in rows(other)[1] if flags[-1].rpartition("=")[2] in command and "method" in command)
        assert shlex.split(started) == ["vllm", "serve", ".", *speculation, *flags], "as it ran, but for the address"
    for flags in (["--tensor-parallel-size=1"], ["--dtype", "auto"]):
        assert rows(drafting | {"command": [*drafting["command"], *flags]})[0][1] == "vLLM 0.32.0", "what holds without the flag, too"
    split = drafting | {"command": [*drafting["command"], "--tensor-parallel-size", "2"]}
    assert rows(drafting | {"on_cpu": True})[0][1] == "vLLM 0.32.0 on a CPU, with the plugin"
    assert rows(drafting | {"command": [*drafting["command"], "--enforce-eager"]})[0][1] == "vLLM 0.32.0", "a flag of GPUs, too"
    seen = {"on_cpu": False, "hardware": 4 * ["A GPU"]}
    assert served_by(split | seen) == "vLLM 0.32.0, 2 x A GPU" and served_by(drafting | seen) == "vLLM 0.32.0, 1 x A GPU"
    assert served_by(drafting | {"command": [*split["command"], "-dp", "2"]} | seen) == "vLLM 0.32.0, on 4 x A GPU"
    assert served_by({"engine": "endpoint", "version": "1", "identity": "not verified"}) == "an endpoint, vLLM 1, hardware not known, not verified"
    assert served_by({"engine": "endpoint", "version": None}) == "an endpoint, version unknown, hardware not known"


def test_a_model_that_thinks_first_gets_room_and_parsers_for_it(converted, tmp_path):
    made, release = read_plan(converted), converted.run_directory / "release"
    assert not thinks(release) and chat_flags(made, False) is None and "max_tokens=200," in client_example({})
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>assistant\n<think>\n")
    assert thinks(tmp_path) and "max_tokens=4096," in client_example({}, True)
    assert chat_flags(made, True) == "--reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5"
    assert chat_flags(made | {"architecture": "MixtralForCausalLM"}, True) is None, "not known"


def served_figures(streams, faults=()):
    """A level of serving.json."""
    latency = {"count": 40, "mean_ms": 321.0, "p50_ms": 317.26, "p90_ms": 400.0, "p95_ms": 410.0, "p99_ms": None}
    windows = [{"begin": 10.0 * number, "end": 10.0 * number + 10, "tokens": 1000 + number, "tokens_per_second": 100.0, "server_tokens": 1001.0,
                "client_over_server": (1000 + number) / 1001, "drafting": {"faults": list(faults)}} for number in range(3)]
    return {"streams": streams, "windows": windows, "tokens_per_second": {"mean": 100.04, "half_interval_95": 4.3, "windows": 3}, "requests": 40,
            "first_requests_left_out": streams, "latency": {"ttft": latency, "tpot": latency | {"p50_ms": 9.16}, "itl": latency, "end_to_end": latency},
            "drafting": {"acceptance_rate": 0.5, "mean_acceptance_length": 2.5, "acceptance_by_position": [0.8, 0.4, 0.2]},
            "warnings": [f"{streams} streams, window 2: not steady", *faults]}


@pytest.mark.parametrize(("prompts", "words", "kind"), [
    ({"content": "random token ids"}, "prompts of 32 random token ids", "random"),
    ({"content": "chats.txt", "sha256": "ab" * 32}, "prompts of 32 tokens, random ones and behind them pieces of chats.txt (sha256 abababababab)", "text")])
def test_serving_figures_stand_with_what_they_were_measured_under(proven, prompts, words, kind):
    """So that somebody can measure them again, from the card alone: serving.json is not in the release."""
    path = proven.run_directory / "serving.json"
    text = path.read_text()
    command = ["vllm", "serve", "results/x/release", "--host", "127.0.0.1", "--port", "4", "--api_key", "secret", "more secret", "--max-model-len", "8192",
               "--served-model-name", "serve", "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}']
    engine = {"engine": "vllm", "version": "0.32.0", "on_cpu": False, "hardware": ["A GPU"], "command": command,
              "driver": "570.1", "variables": {"VLLM_USE_X": "1"}, "backends": ["Using MARLIN Mxfp4 MoE backend"]}
    asked = as_dict(load(["serving=vllm_cuda", "serving.windows=3", "serving.window_seconds=10"]).serving)
    result = {"manifest_sha256": json.loads((proven.run_directory / "verify.json").read_text())["manifest_sha256"], "settings": asked, "engine": engine,
              "prompts": prompts, "levels": [served_figures(8), served_figures(64, ["4 tokens drafted in 3 drafts"])]}
    path.write_text(json.dumps(result))
    (proven.run_directory / "serving").mkdir(exist_ok=True)
    events = Events([("send", 0.0, 0, 1, 32), ("tokens", 12.0, 0, 1, 8), ("tokens", 14.0, 0, 1, 16)], [], [(10.0, 20.0)])
    save_events(proven.run_directory / "serving" / "64.jsonl.gz", events, {})
    report.run(proven)
    page, card = (html.unescape((proven.run_directory / name).read_text()) for name in ("report.html", "card.md"))
    path.write_text(text)
    served = "vllm serve . --max-model-len 8192 --served-model-name serve --speculative-config '{\"method\": \"mtp\", \"num_speculative_tokens\": 3}'"
    for shown in (page, card):
        assert all(said in shown for said in (
            f"greedy, {kind} prompts, ignore_eos", "Completions of 512 tokens", words, "NVIDIA driver 570.1", "Environment: VLLM_USE_X=1",
            "3 windows of 10 s", "95 % confidence interval", served,
            "vLLM 0.32.0, 1 x A GPU", "8 streams, window 2: not steady", "4 tokens drafted in 3 drafts", "cannot be trusted", "first request is in no latency"))
        assert "secret" not in shown
        assert "serving.json" not in shown and "127.0.0.1 " not in shown
    assert "100.0 ± 4.3 tokens/s, 12.5 per stream; TTFT 317 ms, TPOT 9.2 ms (p50 of 40 requests)" in card
    assert all(words in page for words in ("317 / –", "9.2 / –", "0.999 to 1.001", "<details>", "Using MARLIN Mxfp4 MoE backend"))


def test_draft_layers_that_cannot_be_split_are_left_out_of_the_commands(converted):
    made, config = read_plan(converted), json.loads((converted.run_directory / "release" / "config.json").read_text())
    made["tensor_parallel"] = [{"tensor_parallel": size, "fits": True, "marlin": True, "reason": None, "drafts": reason}
                               for size, reason in ((1, None), (8, "a share of 64"))]
    found = {row["command"]: row["title"] for row in serve_commands(made, config, {})}
    assert any("speculative" in command and "tensor-parallel" not in command for command in found)
    assert "without drafting" in found["vllm serve . --tensor-parallel-size 8"]
    assert "tensor parallel 8 without drafting only: a share of 64" in where_it_runs(made)


def test_the_gemm_check_reads_no_more_stacked_experts_than_there_are(tmp_path):
    """It would read into the next tensor."""
    source = tmp_path / "model"
    source.mkdir()
    tensors = {name: tensor[:4].clone() if ".moe." in name and tensor.dim() == 3 or name.endswith("router_bias") else
               tensor[:4].clone() if name.endswith("moe.gate.weight") else tensor for name, tensor in tiny_tensors().items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", source)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"]["moe_num_experts"] = 4
    (source / "config.json").write_text(json.dumps(config))
    settings = convert("source=local", f"source.path={source}", f"results={tmp_path / 'results'}", "recipe=mxfp4_experts_stacked", "serving=none")
    rows = validate_gemm.run(settings)["rows"]
    assert rows and all(row["arithmetic_db"] > 45 for row in rows)


def test_a_config_without_a_vocabulary_is_one_line_to_the_serving_benchmark(converted, tmp_path):
    settings = load([f"results={tmp_path}", f"source.path={TINY}", "serving=endpoint", "serving.url=http://127.0.0.1:9"])
    release = settings.run_directory / "release"
    release.mkdir(parents=True)
    config = json.loads((converted.run_directory / "release" / "config.json").read_text())
    for value, words in ((None, "has no vocab_size"), ("512", "vocab_size is '512', expected a whole number")):
        config["text_config"]["vocab_size"] = value
        (release / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            serve_bench.run(settings)


def test_a_model_too_large_for_this_machine_is_reported_as_not_measured(converted, tmp_path):
    settings = copy_of(converted, f"results={tmp_path}", "evaluation.memory_gb=0.01", "serving=none")
    assert "exceed evaluation.memory_gb=0.01" in evaluate.run(settings)["not_measured"]
    validate_gemm.run(settings)
    serve_bench.run(settings)
    report.run(settings)
    for name in ("report.html", "card.md"):
        assert "exceed evaluation.memory_gb" in (settings.run_directory / name).read_text()


def test_a_text_is_scored_whole_whatever_the_tokenizers_file_says_of_truncation(tmp_path):
    """Tools that calibrate leave both sections in the file."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path)
    text = (PROJECT / "tests/tiny/held_out.txt").read_text()
    expected = evaluate.tokens_of(text, TINY, None)
    found = json.loads((tmp_path / "tokenizer.json").read_text()) | {
        "truncation": {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    assert len(expected) > 2000 and torch.equal(evaluate.tokens_of(text, tmp_path, None), expected)


def test_a_checkpoint_without_tokenizer_json_is_measured_as_far_as_that_goes(converted, tmp_path):
    """As Kimi's are published, for which a server is no remedy either."""
    settings = copy_of(converted, f"results={tmp_path}", "serving=none")
    manifest = settings.run_directory / "release" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["tokenizer.json"]
    manifest.write_text(json.dumps(content))
    (settings.run_directory / "release" / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in evaluate.run(settings)["not_measured"]
    assert (settings.run_directory / "sqnr.json").exists()


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="tokenizer.json is damaged .*: restore the original"):
        evaluate.tokens_of("text", tmp_path, None)


def test_sqnr_in_the_receipts_is_that_of_the_decoded_weights(converted):
    source, release = release_tensors(TINY), release_tensors(converted.run_directory / "release")
    name, expert = "model.layers.4.moe.down_proj.weight", 7
    truth = decode_block_fp8(source[name], source[name + "_scale_inv"])[expert].double()
    stem = f"model.layers.4.moe.experts.{expert}.down_proj.weight"
    made = mxfp4.dequantize(release[stem + "_packed"], release[stem + "_scale"]).double()
    expected = 10 * math.log10(truth.square().sum() / (truth - made).square().sum())
    receipt = read_json(converted.run_directory / "shards" / "model-00003.json", "quantize_experts")
    _, signal, error, _ = receipt["quantized"][name][expert]
    assert 10 * math.log10(signal / error) == pytest.approx(expected, abs=1e-6)


def test_every_token_that_has_one_before_it_in_its_window_is_scored_exactly_once():
    for count, context, stride in ((2, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 3), (1000, 256, 128), (257, 256, 255)):
        scored = []
        for begin, end, first in evaluate.windows(count, context, stride):
            assert min(count, context, FEWEST_TOKENS) <= end - begin <= context and begin < first
            scored += range(first, end)
        assert scored == list(range(1, count))
    for count, context in ((2, 8), (8, 8), (9, 8), (10, 8), (16, 8), (17, 8), (100, 8), (1000, 256), (4096, 2048), (4097, 2048), (5000, 2048)):
        found = evaluate.windows(count, context, context)
        assert [begin for begin, *_ in found[:-1]] == list(range(0, context * (len(found) - 1), context)), "they do not overlap"
        last, end, _ = found[-1]
        assert end == count and last == max(0, min(context * (len(found) - 1), count - min(FEWEST_TOKENS, context)))
        assert all(min(count, context, FEWEST_TOKENS) <= end - begin <= context for begin, end, _ in found)
        scored = [token for _, end, first in found for token in range(first, end)]
        unscored = {begin for begin, _, first in found if first == begin + 1}
        assert scored == [token for token in range(count) if token not in unscored]


def manifest_hash(settings) -> str:
    return hashlib.sha256((settings.run_directory / "release" / "manifest.json").read_bytes()).hexdigest()


def keep_experts(directory: Path, count: int) -> None:
    """Takes all routed experts but the first `count` out of a small Qwen3-MoE."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_local_experts": count}))
    shard = directory / "model.safetensors"
    tensors = {name: tensor[:count].clone() if name.endswith("mlp.gate.weight") else tensor for name, tensor in load_file(shard).items()
               if not (found := re.search(r"\.experts\.(\d+)\.", name)) or int(found[1]) < count}
    save_file(tensors, shard, metadata={"format": "pt"})


def test_a_shard_converted_by_the_triton_kernel_has_the_bytes_of_the_cpu(tmp_path):
    """device=cuda through the whole stage, in Triton's interpreter where there is no GPU; of one layer with one expert, which takes seconds there."""
    source = save("qwen3_moe", tmp_path / "model", fp8=True)
    keep_experts(source, 1)
    made = []
    for backend in ("cpu", "cuda"):
        overrides = ["source=local", f"source.path={source}", f"results={tmp_path / backend}", f"device={backend}",
                     "recipe.groups=[{scheme: mxfp4, patterns: ['.*layers.0.mlp.experts.*weight']}]"]
        settings, _ = prepared(overrides)
        run = subprocess.run([sys.executable, "-m", "stages.quantize_experts", "--shard", "model.safetensors", *overrides], cwd=PROJECT, text=True,
                             capture_output=True, env=os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))
        assert run.returncode == 0, run.stderr
        receipt = read_json(settings.run_directory / "shards" / "model.json", "quantize_experts")
        made.append((receipt["output"]["sha256"], {name: [sums[0] for sums in found] for name, found in receipt["quantized"].items()}))
    assert made[0] == made[1] and made[0][1]


def test_bytes_do_not_depend_on_the_backend(converted, tmp_path):
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", "device.backend=reference")
    assert manifest_hash(settings) == manifest_hash(converted)


def ready_to_convert(converted, results: Path):
    """Settings of a run of its own that is planned and has its second shard's source."""
    settings = load([f"results={results}", f"source.path={TINY}"])
    settings.run_directory.mkdir(parents=True)
    for name in ("inspect.json", "plan.json"):
        shutil.copy(converted.run_directory / name, settings.run_directory / name)
    shutil.copytree(converted.source_directory, settings.source_directory)
    download.fetch_shard(settings, "model-00002.safetensors")
    return settings


def test_converting_on_a_cpu_does_without_torch(converted, tmp_path):
    """Importing it takes longer than converting a gigabyte, and every shard is a process."""
    ready_to_convert(converted, tmp_path)
    script = "import sys; from stages.quantize_experts import main; main(); sys.exit('torch' in sys.modules and 'torch was imported')"
    command = [sys.executable, "-c", script, f"results={tmp_path}", f"source.path={TINY}", "--shard", "model-00002.safetensors"]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0 and "SQNR" in ran.stdout, ran.stderr


def test_a_killed_conversion_leaves_no_partial_file_and_a_rerun_gives_the_same_bytes(converted, tmp_path):
    """SIGKILL in the middle of a shard: no file under the final name, and the next run makes the same release."""
    settings = ready_to_convert(converted, tmp_path)
    killer = ("import os, signal, sys\n"
              "from stages.checkpoint import writer\n"
              "write, count = writer.ShardWriter.write, [0]\n"
              "def die(self, name, data):\n"
              "    write(self, name, data); count[0] += 1\n"
              "    if count[0] == 60: os.kill(os.getpid(), signal.SIGKILL)\n"
              "writer.ShardWriter.write = die\n"
              "from stages.quantize_experts import main\n"
              "main()\n")
    command = [sys.executable, "-c", killer, f"results={tmp_path}", f"source.path={TINY}", "--shard", "model-00002.safetensors"]
    killed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    shard = settings.run_directory / "shards" / "model-00002.safetensors"
    assert not shard.exists() and not shard.with_suffix(".json").exists()
    again = convert(f"results={tmp_path}", f"source.path={TINY}")
    assert manifest_hash(again) == manifest_hash(converted)
    assert not list((settings.run_directory / "shards").glob("*.part*")), "the rerun must clear what the kill left"


def test_a_disk_that_fills_up_while_writing_is_one_line_and_leaves_nothing(converted, tmp_path):
    """A limit on the size of files stands for the full disk: `write` fails in the writer's thread."""
    settings = ready_to_convert(converted, tmp_path)
    limited = ("import resource, sys\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
               "from stages.quantize_experts import main\n"
               "main()\n")
    command = [sys.executable, "-c", limited, f"results={tmp_path}", f"source.path={TINY}", "--shard", "model-00002.safetensors"]
    failed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1, failed.stderr
    assert "File too large" in failed.stderr and "shards/model-00002.safetensors'" in failed.stderr
    assert not list((settings.run_directory / "shards").iterdir())


def test_memory_stays_bounded_on_a_shard_much_larger_than_the_bound(tmp_path):
    """A 1.5-GB shard of routed experts under 1 GB of resident memory, the workflow's promise to its scheduler."""
    directory = tmp_path / "large"
    directory.mkdir()
    experts, rows, columns = 96, 1280, 4096
    layer = "model.layers.0"
    beside = {"model.embed_tokens.weight": (32, columns), "model.norm.weight": (columns,), "lm_head.weight": (32, columns),
              **{f"{layer}.self_attn.{name}_proj.weight": (32, columns) for name in "qkv"}, f"{layer}.self_attn.o_proj.weight": (columns, 32),
              **{f"{layer}.share_expert.{name}_proj.weight": (32, 32) for name in ("gate", "up", "down")}, f"{layer}.moe.gate.weight": (experts, columns)}
    specs = sorted_specs([(name, "BF16", shape) for name, shape in beside.items()] + [(f"model.layers.{layer}.moe.{projection}_proj.{part}", dtype, shape)
                          for layer in (0,) for projection, r, c in (("gate", rows, columns), ("up", rows, columns),
                                                                     ("down", columns, rows))
                          for part, dtype, shape in (("weight", "F8_E4M3", (experts, r, c)),
                                                     ("weight_scale_inv", "F32", (experts, r // 128, c // 128)))])
    generator = numpy.random.default_rng(0)
    codes = generator.integers(0, 127, size=rows * columns, dtype=numpy.uint8)
    with open(directory / "model-00001.safetensors", "wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for _, dtype, shape in specs:
            if dtype == "BF16":
                file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
                continue
            for _ in range(shape[0]):
                file.write(codes.tobytes() if dtype == "F8_E4M3" else
                           numpy.full(shape[1] * shape[2], 0.01, numpy.float32).tobytes())
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {"moe_num_experts": experts, "hidden_size": columns, "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    script = ("import sys\n"
              "from stages import download, inspect_format, plan, quantize_experts\n"
              "from stages.settings import load\n"
              "s = load(sys.argv[1:]); download.fetch_metadata(s); inspect_format.run(s); p = plan.run(s)\n"
              "download.fetch_shard(s, 'model-00001.safetensors')\n"
              "quantize_experts.convert_shard(s, p, 'model-00001.safetensors')\n"
              "print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n")
    ran = subprocess.run([sys.executable, "-c", script, "source=local", f"source.path={directory}",
                          f"results={tmp_path / 'results'}"], cwd=PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    peak = int(ran.stdout.split("PEAK")[1]) / 1024
    assert (directory / "model-00001.safetensors").stat().st_size > 1.5e9
    assert peak < 1000, f"{peak:.0f} MiB resident"


def tiny_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(TINY.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def one_shard(tensors):
    return tensors


def other_prefixes(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        elif name.startswith("v"):
            name = f"model.{name}"
        renamed[name] = tensor
    return renamed


def experts_one_by_one(tensors):
    split = {}
    for name, tensor in tensors.items():
        prefix, moe, rest = name.partition(".moe.")
        if moe and tensor.dim() == 3:
            split |= {f"{prefix}.moe.experts.{expert}.{rest}": tensor[expert].clone() for expert in range(len(tensor))}
        else:
            split[name] = tensor
    return split


def dequantized(tensors):
    return {name: decode_block_fp8(tensor, tensors[name + "_scale_inv"]).bfloat16()
            if tensor.dtype == torch.float8_e4m3fn else tensor
            for name, tensor in tensors.items() if not name.endswith("_scale_inv")}


@pytest.mark.parametrize("layout", [one_shard, other_prefixes, experts_one_by_one, dequantized])
def test_other_ways_to_store_the_same_model_convert_to_the_same_model(converted, tmp_path, layout):
    """One shard without an index, the prefixes of other exports, 2D experts, plain BF16: same weights, same scores."""
    source = tmp_path / "model"
    source.mkdir()
    save_file(layout(tiny_tensors()), source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "tokenizer.json", source)
    config = json.loads((TINY / "config.json").read_text())
    if layout is dequantized:
        config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    settings = convert("source=local", f"source.path={source}", f"results={tmp_path / 'results'}")
    tokens = evaluate.tokens_of((PROJECT / "tests/tiny/held_out.txt").read_text(), TINY, 200)
    ours, theirs = (evaluate.Scorer(s.run_directory / "release", "float32")(tokens)[0] for s in (settings, converted))
    if layout is dequantized:  # BF16 rounded the products of code and scale
        assert (ours - theirs).abs().median() < 0.05
    else:
        assert torch.equal(ours, theirs)


def test_panels_of_any_height_give_the_same_bytes(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer, "PANEL_WEIGHTS", 50)
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", "serving=none")
    ours, theirs = (json.loads((s.run_directory / "release" / "manifest.json").read_text())["files"] for s in (settings, converted))
    assert ours == theirs


def test_one_expert_of_one_tile_is_not_taken_for_a_scale_of_the_whole_tensor():
    stored = {"w": np.full((1, 64, 64), 0x38, np.uint8), "s": np.full((1, 1, 1), 2.0, np.float32)}
    claim = Claim("block_fp8", "s", (128, 128), (1, 64, 64))
    _, scale = stored_rows(Tensors(lambda name: TensorInMemory(stored[name], None)), "w", claim, 0, 0, 64)
    assert scale.shape == (1, 1) and scale.item() == 2.0


@pytest.mark.parametrize("place", ["local", "hub"])
def test_scales_in_another_shard_are_fetched_from_it(converted, tmp_path, monkeypatch, place):
    """All scales moved to a shard of their own, 3D and 2D experts: the same release, and nothing else of that shard moves."""
    source = tmp_path / "model"
    source.mkdir()
    tensors = experts_one_by_one(tiny_tensors()) if place == "local" else tiny_tensors()
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    save_file(tensors, source / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    scales["model.unrelated.weight"] = torch.zeros(1 << 20)
    save_file(scales, source / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, source)
    overrides = [f"results={tmp_path / 'results'}"]
    with HubServer(source, "owner/model", "b" * 40) as hub:
        if place == "hub":
            monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            overrides += ["source=hub", "source.repository=owner/model", f"source.revision={'b' * 40}",
                          "source.shards=[model-00001-of-00002.safetensors,model-00002-of-00002.safetensors]"]
        else:
            overrides += ["source=local", f"source.path={source}"]
        settings, made = planned(*overrides)
        download.fetch_shard(settings, "model-00001-of-00002.safetensors")
        before = hub.sent["model-00002-of-00002.safetensors"]
        receipt = quantize_experts.convert_shard(settings, made, "model-00001-of-00002.safetensors")
        moved = hub.sent["model-00002-of-00002.safetensors"] - before
    release = converted.run_directory / "release"
    expected = json.loads((release / "manifest.json").read_text())["tensors"]
    assert receipt["tensors"] == {name: digest for name, digest in expected.items()}
    made, theirs = load_file(settings.run_directory / "shards" / "model-00001-of-00002.safetensors"), release_tensors(release)
    assert sum(name.endswith("weight_packed") for name in made) == sum(name.endswith("weight_packed") for name in theirs) > 0
    assert all(raw_bytes(tensor) == raw_bytes(theirs[name]) for name, tensor in made.items())
    if place == "hub":
        assert 0 < moved < 100_000, f"{moved} bytes for scales of 2 kB"


def scales_apart(source: Path) -> list[str]:
    """The tiny model with all scales in a shard of their own; settings for it."""
    source.mkdir()
    tensors = tiny_tensors()
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    save_file(tensors, source / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(scales, source / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, source)
    return ["source=local", f"source.path={source}", f"results={source.parent / 'results'}"]


def test_a_scale_that_one_shard_lent_and_another_used_must_be_the_same_bytes(tmp_path):
    """A range of a hub's file has no hash of its own; wrong bytes of a scale would make wrong weights, which the proof would confirm."""
    settings, made = prepared(scales_apart(tmp_path / "model"))
    first, second = made["shards"]
    used = quantize_experts.convert_shard(settings, made, first)["borrowed"]
    lent = quantize_experts.convert_shard(settings, made, second)["lent"]
    assert used == lent and len(used) > 0
    receipts.read_receipts(settings, made)
    path = tmp_path / "model" / second
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    download.fetch_metadata(settings)
    quantize_experts.convert_shard(settings, made, second)
    with pytest.raises(UserError, match=f"{first}: was converted with other bytes of .*_scale_inv than {second} holds"):
        receipts.read_receipts(settings, made)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_nothing_is_compared_with_a_source_that_is_not_the_converted_one_any_more(checkpoint, local, damage):
    settings = convert(*local, "serving=none")
    shard, proof = checkpoint / "model-00003.safetensors", settings.run_directory / "verify.json"
    before = proof.read_bytes()
    if damage == "changed":
        data = bytearray(shard.read_bytes())
        data[-1500000:-100000] = bytes(byte ^ 0x80 for byte in data[-1500000:-100000])
        shard.write_bytes(data)
    else:
        shard.unlink()
    for stage in (evaluate, validate_gemm, *([verify_release] if damage == "changed" else [])):
        with pytest.raises(UserError, match=f"{shard.name} {'was changed since' if damage == 'changed' else 'is missing, it was there when'} the source"):
            stage.run(settings)
    assert proof.read_bytes() == before, "the release is not to blame"
    assert not any((settings.run_directory / name).exists() for name in ("gemm.json", "perplexity.json", "verify.failed.json"))


def test_a_plan_whose_rule_was_edited_is_refused(converted, tmp_path):
    settings = ready_to_convert(converted, tmp_path)
    path = settings.run_directory / "plan.json"
    text = path.read_text()
    path.write_text(text.replace('"exponent_rule": "mse"', '"exponent_rule": "ocp_floor"', 1))
    with pytest.raises(UserError, match="plan.json: was made for other settings"):
        read_plan(settings)
    path.write_text(text)
    assert read_plan(settings)["exponent_rule"] == "mse"


def test_the_listing_of_another_source_of_the_same_name_is_refused_by_the_first_stage_that_reads_it(checkpoint, local, tmp_path):
    planned(*local)
    other = shutil.copytree(checkpoint, tmp_path / "other" / checkpoint.name)
    for stage in (inspect_format, plan):
        with pytest.raises(UserError, match="listing.json: lists .*, which is not the source that the settings name"):
            stage.run(load([*local, f"source.path={other}"]))


def test_experts_of_one_source_are_not_released_as_those_of_another_with_the_same_names_and_shapes(checkpoint, local, tmp_path, monkeypatch):
    convert(*local)
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    shard, name = "model-00003.safetensors", "model.layers.3.moe.up_proj.weight"
    tensors = load_file(other / shard)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, other / shard, metadata={"format": "pt"})
    settings, _ = planned(*local, f"source.path={other}")
    for stage in (assemble_release, verify_release, evaluate, validate_gemm):
        with pytest.raises(UserError, match=f"model-00003.json was made from another file than the {shard} of {other}; run download --shard"):
            stage.run(settings)
    monkeypatch.setattr(receipts, "_is_of", lambda converted, listed: True)  # as where the times of two files are the same
    with pytest.raises(UserError, match=f"{shard}: .*dB against the weights in {other}, below 6.0"):
        validate_gemm.run(load([*local, f"source.path={other}", "evaluation.gemm_tensors=64", "evaluation.gemm_tokens=16"]))


def test_a_shard_of_which_nothing_goes_into_the_release_is_proven_too(tmp_path):
    settings = convert(*scales_apart(tmp_path / "model"), "serving=none")
    made = read_plan(settings)
    assert made["shards"]["model-00002-of-00002.safetensors"]["tensors"] == 0
    assert verify_release.run(settings)["passed"]


def prepared(overrides):
    """Settings and plan of a source whose shards are there, ready to be converted."""
    settings, made = planned(*overrides)
    for shard in made["shards"]:
        download.fetch_shard(settings, shard)
    return settings, made


def test_a_shard_that_another_process_is_writing_is_refused_and_left_to_it(tmp_path):
    from stages.checkpoint.files import atomic_write

    path = tmp_path / "shard"
    (tmp_path / "shard.part").write_bytes(b"left by a run that was killed")
    code = ("import sys, pathlib\nfrom stages.checkpoint.files import atomic_write\nfrom stages.errors import UserError\n"
            "try:\n    with atomic_write(pathlib.Path(sys.argv[1]), direct=True): print('wrote')\n"
            "except UserError as error: print(error)")
    page = mmap.mmap(-1, 4096)  # aligned, as direct writes must be
    with atomic_write(path, direct=True) as file:
        file.write(page)
        run = subprocess.run([sys.executable, "-c", code, str(path)], cwd=PROJECT, capture_output=True, text=True)
        assert "another process is writing this file" in run.stdout, run
        file.write(page)
    assert path.read_bytes() == bytes(8192) and [p.name for p in tmp_path.iterdir()] == ["shard"]
    with pytest.raises(ZeroDivisionError), atomic_write(path, direct=True) as file:
        file.write(page)
        1 / 0
    assert path.read_bytes() == bytes(8192) and [p.name for p in tmp_path.iterdir()] == ["shard"]


def test_a_shard_that_gained_a_tensor_after_it_was_inspected_is_refused(checkpoint, local):
    settings, made = prepared(local)
    shard = sorted(made["shards"])[0]
    tensors = load_file(checkpoint / shard)
    save_file(tensors | {"model.extra.weight": torch.ones(4)}, checkpoint / shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="bytes, .* when the source was listed; run download --metadata again"):
        quantize_experts.convert_shard(settings, made, shard)
    download.fetch_metadata(settings)  # and nothing more of what the line says
    with pytest.raises(UserError, match="model.extra.weight was not there when it was inspected"):
        quantize_experts.convert_shard(settings, made, shard)


@pytest.mark.parametrize("change, words", [
    (lambda path: path.unlink(), "is missing, it was there when the source was listed"),
    (lambda path: os.utime(path, ns=(0, 0)), "was changed since the source was listed"),
])
def test_a_local_shard_that_is_not_the_listed_one_is_refused_before_it_is_read(checkpoint, local, change, words):
    settings, made = prepared(local)
    shard = sorted(made["shards"])[-1]
    change(checkpoint / shard)
    with pytest.raises(UserError, match=words):
        quantize_experts.convert_shard(settings, made, shard)
    assert not (settings.run_directory / "shards").exists() or not list((settings.run_directory / "shards").glob("*"))


def test_a_local_source_is_never_deleted(checkpoint, local):
    """A hub's download that is not what the hub listed is; even where a listing names a hash for a local file, which none does."""
    settings, made = prepared(local)
    shard = sorted(made["shards"])[-1]
    listing = read_json(settings.source_directory / "listing.json", "download")
    listing["files"][shard]["sha256"] = "0" * 64
    write_json(settings.source_directory / "listing.json", listing)
    quantize_experts.convert_shard(settings, made, shard)
    assert (checkpoint / shard).exists()


def test_a_source_that_changes_while_it_is_converted_is_refused(checkpoint, local, monkeypatch):
    settings, made = prepared(local)
    shard = sorted(made["shards"])[-1]
    write = quantize_experts._write

    def change_and_write(*arguments):
        write(*arguments)
        with open(checkpoint / shard, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(quantize_experts, "_write", change_and_write)
    with pytest.raises(UserError, match="changed while it was converted"):
        quantize_experts.convert_shard(settings, made, shard)
    assert not list((settings.run_directory / "shards").glob("*"))


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_a_matrix_that_was_never_measured_fails_the_verification(tmp_path, layout):
    settings = convert(f"results={tmp_path}", f"source.path={TINY}", "serving=none", f"recipe.layout={layout}")
    path = settings.run_directory / "shards" / "model-00003.json"
    (settings.run_directory / "report.html").write_text("Proven.")
    receipt = json.loads(path.read_text())
    group = next(iter(receipt["quantized"]))
    receipt["quantized"][group].pop(1)
    path.write_text(json.dumps(receipt))
    with pytest.raises(UserError, match="matrix 1 of .* was not measured"):
        verify_release.run(settings)
    assert not (settings.run_directory / "report.html").exists()


def test_a_receipt_outlives_other_words_in_the_plan_but_no_other_decision(converted):
    made, shard = read_plan(converted), "model-00003.safetensors"
    before = receipts.plan_hashes(made)[shard]
    name = next(name for name, entry in made["tensors"].items() if entry["shard"] == shard and entry["scheme"])
    made["tensors"][name] |= {"reason": "said in other words", "role": "another"}
    assert receipts.plan_hashes(made)[shard] == before
    for change in ({"scheme": "mxfp8"}, {"tile": [64, 64]}, {"dialect": "plain"}, {"shape": [1]}, {"decision": "keep"}):
        other = {**made, "tensors": {**made["tensors"], name: made["tensors"][name] | change}}
        assert receipts.plan_hashes(other)[shard] != before, change
    assert receipts.plan_hashes({**made, "exponent_rule": "even"})[shard] != before


@pytest.mark.parametrize("change", [
    lambda receipt: {}, lambda receipt: [], lambda receipt: None, lambda receipt: {"plan_sha256": "x", "source": 1},
    lambda receipt: {key: value for key, value in receipt.items() if key != "seconds"}, lambda receipt: receipt | {"tensors": {}},
    lambda receipt: receipt | {"output": {}}, lambda receipt: receipt | {"borrowed": {"nobody": "x"}}, lambda receipt: receipt | {"zeros": 5},
    lambda receipt: receipt | {"quantized": {name: [[*entry[:3], None] for entry in sums] for name, sums in receipt["quantized"].items()}},
    lambda receipt: receipt | {"quantized": dict.fromkeys(receipt["quantized"], 5)},
])
def test_a_receipt_of_another_form_is_named(tmp_path, converted, change):
    shutil.copytree(converted.results, tmp_path / "results", symlinks=True)
    settings = load([f"results={tmp_path / 'results'}", f"source.path={TINY}", "serving=none"])
    path = settings.run_directory / "shards" / "model-00003.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match="model-00003.json is damaged"):
        assemble_release.run(settings)


def test_a_text_of_a_few_tokens_is_refused_in_one_line(converted, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Hi")
    settings = load([f"results={converted.results}", f"source.path={TINY}", "serving=none", f"evaluation.text={text}"])
    with pytest.raises(UserError, match="tokens to score, too few"):
        evaluate.perplexity(settings, read_plan(settings))


def test_a_damaged_cache_of_compiled_kernels_is_named(checkpoint, local, tmp_path):
    prepared(local)
    command = [sys.executable, "-m", "stages.quantize_experts", "--shard", "model-00003.safetensors", *local]

    def converted_with(cache):
        return subprocess.run(command, cwd=PROJECT, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True)

    first = converted_with(tmp_path / "sound")
    assert first.returncode == 0, first.stderr
    for suffix in ("nbi", "nbc"):
        cache = shutil.copytree(tmp_path / "sound", tmp_path / suffix)
        for path in cache.rglob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2 if suffix == "nbc" else 0])
        again = converted_with(cache)
        assert again.returncode == 1 and str(cache) in again.stderr and again.stderr.count("\n") == 1 and "delete" in again.stderr, again.stderr


def test_a_model_published_without_its_draft_layers_is_converted_and_served_without_them(local, checkpoint):
    drafts = tuple(f".layers.{layer}." for layer in (6, 7, 8))
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in drafts)}
        path.unlink()
        if kept:
            save_file(kept, path, {"format": "pt"})
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if not any(part in name for part in drafts)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = convert(*local, "serving=none")
    made, release = read_plan(settings), settings.run_directory / "release"
    assert any("declares 3 draft layers" in note and "not possible" in note for note in made["notes"])
    commands = serve_commands(made, json.loads((release / "config.json").read_text()), {})
    assert not any("speculative" in row.get("command", "") or "plugin" in row["title"] for row in commands)
    assert launcher.drafts_of(release) == 0 and launcher.drafts_of(TINY) == 3
    _, found, loading = step37.load(release, torch.bfloat16)
    assert found is None and loading == {"missing": 0, "unexpected": 0}
    with pytest.raises(UserError, match="the model has no draft layers"):
        plan.run(load([*local, "release.draft_scales=true"]))


def test_draft_scales_that_the_source_holds_are_not_added_again(local, checkpoint):
    shard, name = "model-00005.safetensors", "model.layers.6.self_attn.attn.q_scale"
    save_file(load_file(checkpoint / shard) | {name: torch.ones(1)}, checkpoint / shard, {"format": "pt"})
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = shard
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    prepared(local)
    with pytest.raises(UserError, match=f"the source holds {re.escape(name)} already"):
        plan.run(load([*local, "release.draft_scales=true"]))
