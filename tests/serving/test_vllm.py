"""The tiny release in real vLLM: the same numbers as its expansion to BF16, drafts that are accepted, damage that shows.

These start a server several times (40 s each) and need the serving environment; without it they are skipped. `make serve-env`
makes it.
"""

import base64
import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import evaluate, verify_release
from stages.errors import UserError
from stages.evaluate import tokens_of, windows
from stages.models.step37 import expanded_tensors
from stages.planning.record import read_plan
from stages.serving.environment import is_current
from stages.serving.launcher import server
from stages.serving.load import parse_metrics
from stages.serving.score import token_log_probabilities
from stages.settings import load
from tests.conftest import PROJECT, convert
from tests.small_models import unquantized

pytestmark = [pytest.mark.serving,
              pytest.mark.skipif(not is_current(PROJECT / ".venv-serve"), reason="needs the serving environment: make serve-env")]
TEXT = PROJECT / "tests/tiny/held_out.txt"
CONTEXT, STRIDE, TOKENS = 256, 128, 1025


def served_settings(settings, *overrides):
    return load(["serving=vllm_cpu", f"serving.environment={PROJECT / '.venv-serve'}", f"results={settings.results}",
                 f"source.path={settings.source.path}", *overrides])


def tokens_for(directory):
    return tokens_of(TEXT.read_text(), directory, TOKENS)


def log_probabilities(running, directory):
    tokens = tokens_for(directory)
    return token_log_probabilities(running, tokens, windows(len(tokens), CONTEXT, STRIDE))


def generate(running, prompts=24, tokens=64):
    """Greedy continuations of slices of the text; returns the change of the server's counters."""
    ids = tokens_for(PROJECT / "tests/tiny/step37_tiny").tolist()

    def counters():
        return parse_metrics(httpx.get(f"{running.base_url}/metrics", trust_env=False).text)

    def one(k):
        answer = httpx.post(f"{running.base_url}/v1/completions", timeout=300, trust_env=False, json={
            "model": running.model, "prompt": ids[40 * k:40 * k + 40], "max_tokens": tokens, "temperature": 0, "ignore_eos": True})
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]

    before = counters()
    with ThreadPoolExecutor(8) as pool:
        made = sum(pool.map(one, range(prompts)))
    after = counters()
    assert made == prompts * tokens == after["generation_tokens"] - before["generation_tokens"]
    return (after["spec_decode_num_accepted_tokens"] - before.get("spec_decode_num_accepted_tokens", 0),
            after["spec_decode_num_draft_tokens"] - before.get("spec_decode_num_draft_tokens", 0))


def ask_about(running, color):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (320, 200), color).save(data, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    answer = httpx.post(f"{running.base_url}/v1/chat/completions", timeout=300, trust_env=False, json={
        "model": running.model, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5, "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is this?"}]}]})
    answer.raise_for_status()
    found = answer.json()
    return found["usage"]["prompt_tokens"], [entry["logprob"] for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]


@pytest.fixture(scope="module")
def of_release(converted):
    """Everything asked of the release in one life of the server."""
    settings = served_settings(converted)
    release = converted.run_directory / "release"
    with server(settings, release) as running:
        return {"log_probabilities": log_probabilities(running, release), "drafts": generate(running),
                "images": [ask_about(running, color) for color in ("red", "navy")], "release": release}


def expand(release, target):
    """The release's values in BF16 under the published names, without any quantization_config."""
    return unquantized(release, target, {name: tensor.contiguous() for name, tensor in expanded_tensors(release, torch.bfloat16)})


def test_log_probabilities_are_bitwise_those_of_the_same_values_in_bf16(of_release, converted, tmp_path):
    directory = expand(of_release["release"], tmp_path / "bf16")
    with server(served_settings(converted), directory) as running:
        expected = log_probabilities(running, directory)
    assert torch.equal(of_release["log_probabilities"], expected)


def test_stacked_experts_are_the_same_to_vllm(of_release, converted, tmp_path):
    settings = convert(f"results={tmp_path}", f"source.path={converted.source.path}", "recipe=mxfp4_experts_stacked", "serving=none")
    release = settings.run_directory / "release"
    with server(served_settings(settings), release) as running:
        assert torch.equal(of_release["log_probabilities"], log_probabilities(running, release))
        accepted, drafted = generate(running, prompts=4)
    assert accepted / drafted > 0.4


def test_mxfp8_beside_mxfp4_experts_is_bitwise_its_values_in_bf16(converted, tmp_path):
    settings = convert(f"results={tmp_path}", f"source.path={converted.source.path}", "recipe=mxfp4_experts_mxfp8_rest", "serving=none")
    release, found = settings.run_directory / "release", []
    for directory in (release, expand(release, tmp_path / "bf16")):
        with server(served_settings(settings), directory) as running:
            found.append(log_probabilities(running, directory))
    assert torch.equal(*found)


def test_drafts_are_accepted_at_the_trained_rate(of_release):
    accepted, drafted = of_release["drafts"]
    assert drafted > 500 and 0.4 < accepted / drafted < 0.9  # teacher-forced agreement is 0.73 at the first position


def test_an_image_reaches_the_model(of_release):
    (red_tokens, red), (blue_tokens, blue) = of_release["images"]
    assert red_tokens == blue_tokens > 169 and red != blue


def test_perplexity_through_vllm_agrees_with_the_one_in_process(of_release, converted):
    tokens = tokens_for(of_release["release"])
    scorer = evaluate.Scorer(of_release["release"], "bfloat16")
    values = []
    for begin, end, scored in windows(len(tokens), CONTEXT, STRIDE):
        part = tokens[begin:end]
        found, _ = scorer(part)
        values.append(found[scored - begin - 1:-1].gather(1, part[scored - begin:, None])[:, 0])
    change = (torch.cat(values).double() - of_release["log_probabilities"]).abs()
    assert change.median() < 0.01, f"median {change.median()}, mean {change.mean()}"


def damaged(release, target, damage):
    """A private copy of the release whose experts of layer 2 were damaged by `damage(tensors)`."""
    shutil.copytree(release, target)
    for path in target.glob("model-0*.safetensors"):
        tensors = load_file(path)
        if any(".layers.2.moe.experts." in name for name in tensors):
            path.unlink()
            save_file(damage(tensors), path, {"format": "pt"})
    return target


def wrong_suffix(tensors):
    return {name.replace("weight_packed", "weight_pack") if ".layers.2." in name else name: t for name, t in tensors.items()}


def swapped_gate_and_up(tensors):
    def other(name):
        if ".layers.2.moe.experts." not in name:
            return name
        return name.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")
    return {other(name): tensor for name, tensor in tensors.items()}


def scales_off_by_one(tensors):
    return {name: t + 1 if ".layers.2.moe.experts." in name and name.endswith("weight_scale") else t for name, t in tensors.items()}


@pytest.mark.parametrize("damage", [wrong_suffix, swapped_gate_and_up, scales_off_by_one])
def test_a_damaged_release_gives_other_numbers(of_release, converted, tmp_path, damage):
    directory = damaged(of_release["release"], tmp_path / "damaged", damage)
    try:
        with server(served_settings(converted), directory) as running:
            found = log_probabilities(running, directory)
    except UserError:
        assert damage is wrong_suffix, "vLLM must load this one: its names and shapes are right"
        return
    difference = (found - of_release["log_probabilities"]).abs()
    assert not difference.median() < 0.01, f"{damage.__name__} went unnoticed: median difference {difference.median()}"


def test_permuted_draft_heads_are_not_accepted(of_release, converted, tmp_path):
    directory = tmp_path / "permuted"
    shutil.copytree(of_release["release"], directory)
    for path in directory.glob("model-0*.safetensors"):
        tensors = load_file(path)
        if heads := [name for name in tensors if "shared_head.output" in name]:
            path.unlink()
            save_file(tensors | {name: tensors[name].roll(131, 0).contiguous() for name in heads}, path, {"format": "pt"})
    with server(served_settings(converted), directory) as running:
        accepted, drafted = generate(running)
        assert torch.equal(log_probabilities(running, directory), of_release["log_probabilities"])
    assert drafted > 500 and accepted / drafted < 0.02


def test_the_inert_scalars_load_without_the_loader_patch_and_nothing_else_does(converted, tmp_path):
    skip = "+serving.variables.MXFORGE_VLLM_SKIP=draft_scales"
    with pytest.raises(UserError, match="will falsely use random initialization"):
        with server(served_settings(converted, skip), converted.run_directory / "release"):
            pass
    settings = convert(f"results={tmp_path}", f"source.path={converted.source.path}", "release.draft_scales=true")
    assert read_plan(settings)["draft_scales"] and verify_release.run(settings)["passed"]
    with server(served_settings(settings, skip), settings.run_directory / "release") as running:
        accepted, drafted = generate(running, prompts=4)
    assert accepted / drafted > 0.4


def test_the_stage_scores_source_and_release_through_servers(converted, tmp_path):
    settings = served_settings(converted, "evaluation.via=vllm", f"evaluation.maximum_tokens={TOKENS}")
    found = evaluate.perplexity(settings, read_plan(converted))
    assert found["release"]["tokens"] == found["source"]["tokens"] == TOKENS - 1
    assert 0.97 < found["paired"]["perplexity_ratio"] < 1.03
