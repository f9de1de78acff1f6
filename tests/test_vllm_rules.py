"""The simulation of vLLM's name matching against vLLM's own functions, where vLLM is installed: here or beside."""

import importlib.util
import json
import subprocess
import sys

import pytest

from stages.schemes.architectures import ARCHITECTURES
from stages.serving.environment import is_current
from tests.conftest import PROJECT

SERVING = PROJECT / ".venv-serve"


def test_simulation_agrees_with_vllm_on_ten_thousand_random_cases():
    python = sys.executable if importlib.util.find_spec("vllm") else SERVING / "bin" / "python"
    if python != sys.executable and not is_current(SERVING):
        pytest.skip("needs vLLM, here or in the serving environment: make serve-env")
    ran = subprocess.run([python, "-m", "tests.vllm_matching"], cwd=PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    shown = json.loads(ran.stdout.splitlines()[-1])
    seen, names = shown["outcomes"], shown["names"]
    assert set(names) == {name for row in ARCHITECTURES for name in row.names}, "vLLM here lacks one, or knows it by another name"
    assert min(names[name] for name in ("Qwen3_5MoeForConditionalGeneration", "Step3p7ForConditionalGeneration", "Qwen3NextForCausalLM",
                                        "Qwen3VLMoeForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Qwen3_5MoeForCausalLM",
                                        "InternS1ForConditionalGeneration")) > 400, names
    assert sum(seen.values()) == 10_000
    assert min(seen.values()) > 50, f"the cases do not reach every outcome: {seen}"
