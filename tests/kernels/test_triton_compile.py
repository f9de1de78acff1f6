"""The Triton kernels become sound machine code for an H100, on a machine without a GPU.

Compiled in a process of its own, because triton reads TRITON_INTERPRET once, when it is imported. There the project's own
functions run on small CPU tensors, with every launch replaced by its compilation, so that the code examined is the code that
they would run: their constants, their alignments, their options.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def waits_in_loop(ttgir: str) -> list[int]:
    """How many groups of loads may still be under way where the loop goes on."""
    _, _, loop = ttgir.partition("scf.for")
    return [int(number) for number in re.findall(r"async_wait [^\n]*\{num = (\d+)", loop.partition("scf.yield")[0])]


def opcodes(code: str) -> list[str]:
    """The instructions of a disassembly, in their order."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)


def longest_loop(code: str) -> str:
    """What lies between a label and the last branch back to it, where most does; nothing without loops."""
    lines, begin, loops = code.splitlines(), {}, [""]
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            begin[label[1]] = number
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and branch[1] in begin:
            loops.append("\n".join(lines[begin[branch[1]]:number + 1]))
    return max(loops, key=len)


def compile_all(target: int) -> dict[str, dict]:
    """Call the backends for sm_<target>; name -> stack bytes per thread, PTX, number of machine instructions by opcode."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from kernels.gemm import cuda as gemm
    from kernels.mxfp4 import cuda as mxfp4

    class Driver:
        """What a launch asks of a GPU before it compiles."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", target, 32)

    def compile_only(kernel, *arguments, grid, warmup, **options):
        made.append((kernel.__name__, launch(kernel, *arguments, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(Driver())
    launch, JITFunction.run = JITFunction.run, compile_only
    tools, result = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", {}

    def quantize(rule="mse", importance=None):
        weight = torch.zeros(2, 128, 1280, dtype=torch.uint8).view(torch.float8_e4m3fn)
        mxfp4.quantize(weight, torch.ones(2, 1, 10), rule, (128, 128), importance)

    def multiply(tokens, experts, dtype=torch.bfloat16, out=256, columns=1024):
        packed, scale = (torch.zeros(experts, out, columns // part, dtype=torch.uint8) for part in (2, 32))
        offsets = torch.linspace(0, tokens, experts + 1).long()
        gemm.grouped_linear(torch.zeros(tokens, columns, dtype=dtype), packed, scale, offsets)

    cases = {
        "quantize FP8": quantize,
        "quantize FP8, even": lambda: quantize("even"),
        "quantize BF16": lambda: mxfp4.quantize(torch.zeros(2, 128, 1280, dtype=torch.bfloat16), None, "mse", (128, 128), None),
        "quantize with importance": lambda: quantize(importance=torch.ones(1280)),
        "dequantize": lambda: mxfp4.dequantize(torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8), torch.bfloat16),
        "gemm grouped": lambda: multiply(24, 8, columns=4096),
        "gemm 8 rows": lambda: multiply(8, 1, out=1280, columns=4096),
        "gemm 32 rows": lambda: multiply(32, 1, out=1280, columns=4096),
        "gemm grouped, many programs": lambda: multiply(64, 64, out=1280),
        "gemm 64 rows": lambda: multiply(64, 1),
        "gemm 1024 rows in 4 experts": lambda: multiply(1024, 4),
        "gemm 1024 rows, dense": lambda: multiply(1024, 1),
        "gemm float32": lambda: multiply(8, 1, torch.float32),
    }
    for name, call in cases.items():
        made = []
        call()
        for kernel, compiled in made:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
                code = subprocess.run([tools / "nvdisasm", "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
            names = opcodes(code)
            result[f"{name}: {kernel}"] = {
                "stack": int(re.search(r"STACK:(\d+)", usage)[1]), "ptx": compiled.asm["ptx"], "ttir": compiled.asm["ttir"],
                "waits": waits_in_loop(compiled.asm["ttgir"]),
                "code": {n: names.count(n) for n in sorted(set(names))}, "loop": len(opcodes(longest_loop(code))),
            }  # fmt: skip
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).exists()]
    if missing:
        pytest.skip(f"this triton brings no {', '.join(missing)}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # quicker
    run = subprocess.run([sys.executable, "-W", "ignore", __file__, "90"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(run.stdout)


def count(kernel: dict, start: str) -> int:
    return sum(n for name, n in kernel["code"].items() if name.startswith(start))


def test_no_kernel_spills_registers_or_flushes_subnormals(compiled):
    assert len(compiled) == 16  # the grouped cases launch two
    for name, kernel in compiled.items():
        assert kernel["stack"] == 0 and count(kernel, "LDL") + count(kernel, "STL") == 0, f"{name} spills: {kernel['stack']} bytes of stack"
        assert ".ftz" not in kernel["ptx"], name


def test_sums_that_choose_exponents_have_no_contracted_float64_products(compiled):
    """fl64(importance * term) is rounded before it is added; elsewhere the choice is made on integers."""
    kernel = compiled["quantize with importance: quantize_kernel"]
    assert count(kernel, "DMUL") and count(kernel, "DADD") and not count(kernel, "DFMA")


@pytest.mark.parametrize("name, budget", [("quantize FP8", 30), ("quantize FP8, even", 22), ("quantize BF16", 32)])
def test_quantizing_takes_few_instructions_per_weight(compiled, name, budget):
    """A thread converts 32 weights in a step; while an H100 moves the bytes of a weight, it has time for about 20 (FP8) or 33 (BF16) instructions."""
    assert 10 * 32 < compiled[f"{name}: quantize_kernel"]["loop"] <= budget * 32


def test_large_loads_and_stores_are_vectors(compiled):
    assert count(compiled["quantize FP8: quantize_kernel"], "LDG.E.128") and count(compiled["quantize FP8: quantize_kernel"], "STG.E.128")
    assert count(compiled["dequantize: dequantize_kernel"], "LDG.E.128") and count(compiled["dequantize: dequantize_kernel"], "STG.E.128")


@pytest.mark.parametrize("name, instruction, weights", [  # that a thread decodes in a step
    ("grouped", "HMMA", 32), ("8 rows", "HMMA", 16), ("32 rows", "HMMA", 32), ("grouped, many programs", "HMMA", 32), ("64 rows", "HGMMA", 32),
    ("1024 rows in 4 experts", "HGMMA", 32)])
def test_bfloat16_gemm_multiplies_on_tensor_cores_loads_ahead_and_decodes_in_pairs(compiled, name, instruction, weights):
    kernel = compiled[f"gemm {name}: grouped_kernel"]
    assert count(kernel, instruction), sorted(kernel["code"])
    assert count(kernel, "LDGSTS") and not count(kernel, "LDG.E.U8"), f"{name}: a load waits in the loop: {sorted(kernel['code'])}"
    assert not count(kernel, "STS.U16"), f"{name}: decoded weights are stored one by one"
    assert count(kernel, "HMUL2.BF16") >= weights and count(kernel, "FMUL") <= 8, f"{name}: weights are decoded one by one: {kernel['code']}"
    assert kernel["waits"] and not any(wait == 0 for wait in kernel["waits"]), f"{name}: every step waits for all of its loads: {kernel['waits']}"


def test_many_rows_of_one_matrix_are_left_to_cublas(compiled):
    assert [name for name in compiled if "dense" in name] == ["gemm 1024 rows, dense: dequantize_kernel"]


def test_sizes_past_int32_are_not_cut(compiled):
    """The number of weights is twice the number of bytes, which is an int32 below 2^31."""
    ttir = compiled["dequantize: dequantize_kernel"]["ttir"]
    assert not re.search(r"muli %bytes_in_all\w*, %\w+ : i32", ttir) and re.search(r"muli .* : i64", ttir)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
