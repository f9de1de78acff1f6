"""Small random models of the families, converted and served by real vLLM on a CPU: it says what it says of the same values in BF16.

Each case starts a server twice (40 s each). One window of tokens and one request at a time: vLLM's latent attention on a CPU is not
reproducible across batches.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from stages.checkup.source import Source
from stages.dialects.reading import decoded
from stages.schemes.architectures import ARCHITECTURES, VLLM
from stages.schemes.engines import form_of
from stages.schemes.modules import matrices
from stages.serving.environment import is_current
from stages.serving.launcher import server
from stages.serving.score import token_log_probabilities
from stages.settings import load
from tests.conftest import PROJECT, TINY, convert, planned
from tests.small_models import expanded, save, unquantized

CASES = [("qwen3", False, "mxfp4_all_linear"), ("qwen3_moe", True, "mxfp4_experts"), ("qwen3_moe", False, "mxfp8_experts"),
         ("qwen3_moe", False, "mxfp4_all_linear"), ("qwen3_next", False, "mxfp4_experts"), ("qwen3_next", True, "mxfp4_experts"),
         ("qwen3_next", False, "mxfp4_experts_mxfp8_rest"), ("mixtral", False, "mxfp4_experts"), ("glm4_moe", False, "mxfp4_experts"),
         ("glm4_moe", True, "mxfp4_experts_mxfp8_rest"), ("minimax_m2", True, "mxfp4_experts"), ("ernie4_5_moe", False, "mxfp4_experts"),
         ("ernie4_5_moe", False, "mxfp4_experts_mxfp8_rest"), ("exaone_moe", False, "mxfp4_experts"), ("exaone_moe", True, "mxfp4_experts"),
         ("exaone_moe", "self_attn|mtp", "mxfp4_experts"), ("exaone_moe", False, "mxfp4_experts_mxfp8_rest"), ("afmoe", False, "mxfp4_experts"),
         ("afmoe", "self_attn", "mxfp4_experts"), ("afmoe", False, "mxfp4_experts_mxfp8_rest"), ("hy_v3", False, "mxfp4_experts"),
         ("hy_v3", True, "mxfp4_experts"), ("hy_v3", False, "mxfp4_experts_mxfp8_rest"), ("bailing_moe_v2", False, "mxfp4_experts"),
         ("bailing_moe_v2", True, "mxfp4_experts"), ("bailing_moe_v2", False, "mxfp4_experts_mxfp8_rest"),
         ("bailing_moe", False, "mxfp4_experts"), ("mimo_v2_flash", False, "mxfp4_experts"),
         ("mimo_v2_flash", True, "mxfp4_experts_mxfp8_rest"), ("glm4v_moe", False, "mxfp4_experts"), ("glm4v_moe", True, "mxfp4_experts"),
         ("glm4v_moe", False, "mxfp4_experts_mxfp8_rest"), ("deepseek_v3", True, "mxfp4_experts"), ("moonlight", True, "mxfp4_experts"),
         ("moonlight", False, "mxfp4_all_linear"), ("kimi_k25", False, "mxfp4_experts"), ("qwen3_5_moe", False, "mxfp4_experts"),
         ("qwen3_5_moe", True, "mxfp4_experts"), ("qwen3_5_moe", False, "mxfp4_experts_mxfp8_rest"),
         ("qwen3_5_moe", False, "mxfp4_all_linear"), ("qwen3_vl_moe", False, "mxfp4_experts"), ("qwen3_vl_moe", True, "mxfp4_experts"),
         ("qwen3_vl_moe", False, "mxfp4_experts_mxfp8_rest"), ("qwen3_vl_moe", False, "mxfp4_all_linear"),
         ("deepseek_v2", False, "mxfp4_experts"), ("deepseek_v2", False, "mxfp4_experts_mxfp8_rest"), ("qwen3_5_moe_text", False, "mxfp4_experts"),
         ("qwen3_5_moe_text", True, "mxfp4_experts"), ("interns1", False, "mxfp4_experts"), ("interns1", True, "mxfp4_experts"),
         ("internvl", False, "mxfp4_experts"), ("dots1", False, "mxfp4_experts")]
FLAGS = {**dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "internvl"), ["--language-model-only"]),  # these have no image processor here
         "interns1": ["--language-model-only", "--trust-remote-code"],
         **dict.fromkeys(("bailing_moe", "bailing_moe_v2"), ["--trust-remote-code"])}  # transformers has no class for their config.json
OF_THE_TINY_MODEL = ["mxfp4_experts", "mxfp4_experts_stacked", "mxfp4_experts_mxfp8_rest"]
needs_vllm = pytest.mark.skipif(not is_current(PROJECT / ".venv-serve"), reason="needs the serving environment: make serve-env")
TOKENS = torch.randint(16, 512, (257,), generator=torch.Generator().manual_seed(3))


def log_probabilities(settings, directory, *flags):
    served = load(["serving=vllm_cpu", f"serving.environment={PROJECT / '.venv-serve'}", f"results={settings.results}", "source=local",
                   f"source.path={settings.source.path}", "serving.drafts=false",
                   f"serving.flags={json.dumps(['--enforce-eager', '--max-model-len', '2048', *flags])}"])
    with server(served, directory) as running:
        return token_log_probabilities(running, TOKENS, [(0, len(TOKENS), 1)])


def overrides_for(family, fp8, recipe, directory):
    source = save(family, directory / family, fp8)
    return ["source=local", f"source.path={source}", f"results={directory / 'results'}", f"recipe={recipe}", "serving=none"]


def test_every_form_that_is_said_to_load_in_vllm_has_a_case_here(tmp_path):
    run = {}
    for number, (family, fp8, recipe) in enumerate(CASES):
        _, made = planned(*overrides_for(family, fp8, recipe, tmp_path / str(number)))
        run.setdefault(made["architecture"], set()).add(form_of(made))
        assert made["engines"][0]["loads"] == "yes"
    for recipe in OF_THE_TINY_MODEL:
        _, made = planned(f"source.path={TINY}", f"results={tmp_path / 'results'}", f"recipe={recipe}", "serving=none")
        run.setdefault(made["architecture"], set()).add(form_of(made))
    said = {row.names[0]: set(entry.forms) for row in ARCHITECTURES for entry in row.tried if entry.engine == VLLM}
    assert run == said


@needs_vllm
@pytest.mark.serving
@pytest.mark.parametrize(("family", "fp8", "recipe"), CASES)
def test_a_family_says_the_same_in_both_forms(family, fp8, recipe, tmp_path):
    settings = convert(*overrides_for(family, fp8, recipe, tmp_path))
    release = settings.run_directory / "release"
    flags = FLAGS.get(family, [])
    found = log_probabilities(settings, release, *flags)
    assert torch.equal(found, log_probabilities(settings, expanded(release, tmp_path / "bf16"), *flags))
    assert found.std() > 0.5  # it says something


@needs_vllm
@pytest.mark.serving
def test_vllm_reads_transposed_experts_as_they_are_converted(tmp_path):
    """Its gate_up_proj is square: nothing but the order of its dimensions tells the published one from its transpose."""
    settings = convert(*overrides_for("qwen3_vl_moe", False, "mxfp4_experts", tmp_path))
    tensors = load_file(tmp_path / "qwen3_vl_moe" / "model.safetensors")
    with Source(tmp_path / "qwen3_vl_moe") as source:
        source.read(tmp_path)
        for name, claim in source.claims.items():
            if claim.transposed:
                values = decoded(source.places, name, claim).bfloat16()
                tensors |= {f"{matrix.module}.weight": values[matrix.index, slice(*matrix.rows)].contiguous()
                            for matrix in matrices(name, claim.matrix, "per_expert")}
                del tensors[name]
    apart = unquantized(settings.run_directory / "release", tmp_path / "apart", tensors)
    found = log_probabilities(settings, tmp_path / "qwen3_vl_moe", *FLAGS["qwen3_vl_moe"])
    assert torch.equal(found, log_probabilities(settings, apart, *FLAGS["qwen3_vl_moe"]))
