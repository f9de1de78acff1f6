"""Numbers and arguments that cannot be converted stop with an error that says where, on every backend alike."""

import pickle

import pytest
import torch
from kernel_cases import FP8, block_fp8, check_refusals

from kernels.fp8 import decode_block_fp8
from kernels.mxfp4 import NonFiniteError, backends, dequantize, quantize


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_infinity_and_bad_tile_scales_are_refused_at_their_index(backend):
    check_refusals(backend, "cpu")


def test_decoding_refuses_what_quantizing_refuses():
    codes, scale = block_fp8((40, 64))
    scale[0, 0] = 0
    with pytest.raises(NonFiniteError, match="tile scale"):
        decode_block_fp8(codes, scale)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scale_byte_255_is_refused_at_its_index(backend):
    scale = torch.zeros(2, 3, 2, dtype=torch.uint8)
    scale[1, 2, 1] = 255
    with pytest.raises(NonFiniteError) as caught:
        dequantize(torch.zeros(2, 3, 32, dtype=torch.uint8), scale, backend=backend)
    assert caught.value.index == (1, 2, 1)


def test_the_error_survives_the_way_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(NonFiniteError("weight", (1, 2), 3.0)))
    assert (error.what, error.index, error.value) == ("weight", (1, 2), 3.0)


@pytest.mark.parametrize(
    "weight, scale, options, message",
    [
        (torch.zeros(4, 33), None, {}, r"\(4, 33\)"),
        (torch.zeros(32), None, {}, r"\(32,\)"),
        (torch.zeros(4, 32, dtype=torch.float64), None, {}, "float64"),
        (torch.zeros(4, 32).to(FP8), None, {}, "tile_scale is missing"),
        (torch.zeros(4, 32), torch.ones(1, 1), {}, "belongs to float8"),
        (torch.zeros(4, 32).to(FP8), torch.ones(2, 1), {}, r"needs \(1, 1\)"),
        (torch.zeros(4, 32).to(FP8), torch.ones(1, 1, dtype=torch.float64), {}, "float64"),
        (torch.zeros(4, 32), None, {"rule": "best"}, "best"),
        (torch.zeros(4, 32), None, {"backend": "tpu"}, "tpu"),
        (torch.zeros(4, 32), None, {"importance": torch.ones(31)}, "31"),
        (torch.zeros(4, 32), None, {"importance": -torch.ones(32)}, "negative"),
        (torch.zeros(4, 32), None, {"importance": torch.ones(32), "rule": "even"}, "only mse"),
    ],
)
def test_wrong_arguments_are_named(weight, scale, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, scale, **options)


def test_a_machine_without_gpu_offers_no_gpu_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ("cuda" in backends()) == torch.cuda.is_available()
    assert backends()[:2] == ["reference", "cpu"]


def test_importing_the_package_loads_neither_numba_nor_triton():
    import subprocess
    import sys
    from pathlib import Path

    script = "import sys, kernels.mxfp4, kernels.gemm; sys.exit('numba' in sys.modules or 'kernels.mxfp4.cuda' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_read_only_installation_still_compiles(tmp_path):
    import os
    import shutil
    import subprocess
    import sys
    from pathlib import Path

    shutil.copytree(Path(__file__).parents[2] / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    cpu = tmp_path / "kernels/mxfp4/cpu.py"
    # numba raises this where neither __pycache__ nor the user's cache directory can be written; root can write anywhere
    script = (
        "import numba, torch; real = numba.njit\n"
        "def njit(*a, **k):\n    if k.get('cache'): raise RuntimeError('cannot cache function: no locator available')\n    return real(*a, **k)\n"
        "numba.njit = njit\nfrom kernels.mxfp4 import quantize; import kernels.mxfp4.cpu as c\n"
        f"assert c.__file__ == {str(cpu)!r}; print(quantize(torch.ones(1, 32)).scale.item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.stdout.strip() == "125", made.stderr[-2000:]
