"""Runs triton_cases.py: in Triton's interpreter on any machine, natively where there is a GPU.

In a process of its own, because triton reads TRITON_INTERPRET once, when it is imported, and because with that variable set
every other test of the session would find a "cuda" backend and use it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
SOME = ("gemm or many_rows", "float_weights", "refused")  # the interpreter takes minutes for all of them, which processes of `pytest -n` share
PARTS = (*SOME, f"not ({' or '.join(SOME)})")


def run_cases(interpret: bool, part: str = "") -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "-k", part, str(CASES)]
    made = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]


@pytest.mark.parametrize("part", PARTS)
def test_triton_kernels_in_the_interpreter_write_the_reference_bytes(part):
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(interpret=True, part=part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernels_on_the_gpu_write_the_reference_bytes():
    run_cases(interpret=False)
