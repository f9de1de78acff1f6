"""Claim: on a GPU the Triton kernels write the reference's bytes at a stated fraction of memory bandwidth.

    python benchmarks/kernels_gpu.py --record benchmarks/records/<name>.json

Needs a CUDA device, torch and triton, and what triton needs to start: a C compiler and Python's headers. Correctness first: a wrong
byte ends the run with exit status 1 before anything is timed. Then, in one run: quantize and dequantize as fractions of a
device-to-device copy, in bytes read and written per second, and the GEMMs against cuBLAS in BF16 on the decoded weights (which read four
times the bytes), with errors against float64.

"kernel" is what the backend launches, captured in a CUDA graph, so that Python and the driver take no part; where a capture fails, the
record says so. "public" is the function that checks its arguments first, reads the scales and waits for the answer; it is compared with
cuBLAS launched from Python, too. One linear layer is smaller than the L2 cache and done in a few microseconds: a graph holds as many
calls, each on a copy of the weights of its own, as fill several caches, and the record has the time of one. Grouped baselines: one cuBLAS
matmul per expert that has rows, offsets known to the host beforehand, and torch's grouped_mm where there is one.

The record is written after each section, so that one that fails does not take the others with it.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "kernels")]

import kernel_cases  # noqa: E402
from kernels import gemm, mxfp4  # noqa: E402

SHAPES = [(4096, 1280), (1280, 4096)]  # out, in: Step-3.7's down and gate/up projections
TOKENS = [1, 8, 32, 128, 1024]
EXPERTS, TOP = 288, 8
SPREAD = 256 << 20  # bytes of weights that the calls in one graph read together: several L2 caches
SCALES = (*(2.0**power for power in (-149, -140, -127, -126, -125, -117, -60, -20, -10, 0, 10, 60)), 3e-4, 3.1e-38, 1.1e-4, 0.7, 7.5e35)


def block_fp8(shape, generator):
    """Random codes without NaN, random scales; on the device."""
    codes = torch.randint(0, 127, shape, device="cuda", dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, shape, device="cuda", dtype=torch.uint8, generator=generator) << 7
    tiles = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scale = (torch.rand(tiles, device="cuda", generator=generator) + 0.1) * 1e-4
    return codes.view(torch.float8_e4m3fn), scale


def check(generator) -> list[str]:
    """Bytes, sums, decoded values and refusals against the reference, GEMMs against float64; AssertionError says what is wrong."""
    done = []

    def same(weight, scale, name, **options):
        kernel_cases.compare("cuda", "cuda", weight, scale, name=name, **options)
        done.append(f"{name} {options.get('rule', 'mse')}")

    for rule in mxfp4.RULES:
        for name, weight in kernel_cases.float_blocks().items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                largest = torch.finfo(dtype).max
                same(weight.clamp(-largest, largest).to(dtype), None, f"{name} {dtype}", rule=rule)
        for value in SCALES:
            same(*kernel_cases.every_code(value), f"every code times {value:g}", rule=rule)
        for shape in ((3, 200, 288), (2, 1280, 4096), (5, 123 * 32), (1, 32)):
            same(*(part.cpu() for part in block_fp8(shape, generator)), f"{shape}", rule=rule)
        same(block_fp8((40, 96), generator)[0].cpu(), torch.rand(6, 2) + 0.1, "tiles of 7 x 48", rule=rule, tile=(7, 48))
    importance = torch.rand(288) ** 4
    same(*(part.cpu() for part in block_fp8((3, 200, 288), generator)), "FP8 with importance", importance=importance)
    same(torch.randn(40, 288), None, "float32 with importance", importance=importance)
    kernel_cases.check_refusals("cuda", "cuda")
    done.append("refusals")
    for shape in ((1280, 4096, (1, 33, 300)), (1280, 1312, (5, 300)), (40, 64, (520,))):
        kernel_cases.check_gemm("cuda", "cuda", *shape)
        done.append(f"GEMM {shape}")
    kernel_cases.check_gemm_decodes_exactly("cuda", "cuda")
    done.append("GEMM decodes every byte")
    return done


def warm_up(seconds: float = 0.5) -> None:
    """Brings the clocks to where they are under load."""
    a = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def captured(run):
    """`run` as a CUDA graph's replay, or itself where it cannot be captured; and which of the two. Memory that the graph uses stays taken."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, True
    except RuntimeError as error:
        print(f"kernels_gpu: not captured in a graph, timed with its launches: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return run, False


def interleaved(table: dict, repetitions: int, calls: dict | None = None) -> dict:
    """name -> {median_ms, min_ms, max_ms} of one call by CUDA events; each repetition runs every row, after a flush of the L2 cache.

    calls: name -> number of calls that a row makes, 1 where it is not named.
    """
    warm_up()
    flush = torch.ones(64 << 20, dtype=torch.int32, device="cuda")
    times = {name: [] for name in table}
    for repetition in range(repetitions + 3):
        for name, run in table.items():
            flush.sum()  # reads: lines that were written would have to go back to memory while `run` is timed
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if repetition >= 3:
                times[name].append(start.elapsed_time(end))
    calls = calls or {}
    return {n: {"median_ms": statistics.median(t) / calls.get(n, 1), "min_ms": min(t) / calls.get(n, 1), "max_ms": max(t) / calls.get(n, 1)}
            for n, t in times.items()}


def bandwidth(generator, repetitions: int) -> list[dict]:
    """One layer's experts of one projection. "public" functions check for what is not finite and wait for the answer."""
    from kernels.mxfp4 import cuda

    codes, scale = block_fp8((EXPERTS, 1280, 4096), generator)
    made = mxfp4.quantize(codes, scale, backend="cuda")
    small = made.packed.numel() + made.scale.numel()
    table, moved, graphs = {}, {}, {}

    def kernel(name, run):
        table[name], graphs[name] = captured(run)

    for rule in mxfp4.RULES:
        table[f"quantize FP8, {rule}, public"] = lambda rule=rule: mxfp4.quantize(codes, scale, rule=rule, backend="cuda")
        moved[f"quantize FP8, {rule}, public"] = codes.numel() + small
        kernel(f"quantize FP8, {rule}, kernel", lambda rule=rule: cuda.launch_quantize(codes, scale, rule, (128, 128), None))
        moved[f"quantize FP8, {rule}, kernel"] = codes.numel() + small
    for name, dtype, size in (("BF16", torch.bfloat16, 2), ("float32", torch.float32, 4)):
        table[f"dequantize to {name}, public"] = lambda dtype=dtype: mxfp4.dequantize(made.packed, made.scale, dtype, backend="cuda")
        kernel(f"dequantize to {name}, kernel", lambda dtype=dtype: cuda.dequantize(made.packed, made.scale, dtype))
        moved |= {f"dequantize to {name}, {kind}": small + size * codes.numel() for kind in ("public", "kernel")}
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    table["copy"], moved["copy"] = lambda: target.copy_(source), 2 * source.numel()
    measured = interleaved(table, repetitions)
    rate = {name: moved[name] / row["median_ms"] / 1e6 for name, row in measured.items()}
    return [{"name": n, **row, "GB_per_s": rate[n], "of_copy": rate[n] / rate["copy"], "captured": graphs.get(n, False)} for n, row in measured.items()]


def unchecked(x, packed, scale, offsets):
    """The backend's function, without the public one's checks."""
    from kernels.gemm.cuda import grouped_linear

    return grouped_linear(x, packed, scale, offsets)


def relative_error(y, truth) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((y.double() - truth).norm() / truth.norm())


def linears(generator, repetitions: int) -> list[dict]:
    """One linear layer at Step-3.7's shapes: ours and cuBLAS BF16, ms and relative error, for each number of tokens."""
    result = []
    for out, columns in SHAPES:
        made = mxfp4.quantize(torch.randn(out, columns, device="cuda", generator=generator) * 0.02, backend="cuda")
        weight = mxfp4.dequantize(made.packed, made.scale, torch.bfloat16, backend="cuda")
        copies = SPREAD // made.packed.numel()
        packed, scale, weights = (part.expand(copies, *part.shape).contiguous() for part in (made.packed, made.scale, weight))
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda", generator=generator).to(torch.bfloat16)
            offsets = torch.tensor([0, tokens], device="cuda")
            table = {
                "public": lambda: gemm.linear(x, made.packed, made.scale, backend="cuda"),
                "cublas launched": lambda: x @ weight.T,
                "kernel": lambda: [unchecked(x, packed[i:i + 1], scale[i:i + 1], offsets) for i in range(copies)][-1],
                "cublas": lambda: [x @ weights[i].T for i in range(copies)][-1],
            }
            result.append(row("linear", out, columns, tokens, table, x.double() @ weight.double().T, repetitions, copies))
    return result


def experts(generator, repetitions: int) -> list[dict]:
    """The grouped experts, 288 with 8 per token: ours and cuBLAS BF16, ms and relative error."""
    result = []
    for out, columns in SHAPES:
        made = mxfp4.quantize(*block_fp8((EXPERTS, out, columns), generator), backend="cuda")
        weight = mxfp4.dequantize(made.packed, made.scale, torch.bfloat16, backend="cuda")
        for tokens in TOKENS:
            chosen = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).topk(TOP, dim=1).indices.flatten()
            offsets = torch.zeros(EXPERTS + 1, dtype=torch.int64, device="cuda")
            offsets[1:] = torch.bincount(chosen, minlength=EXPERTS).cumsum(0)
            bounds = offsets.tolist()
            used = [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:])) if a < b]
            x = torch.randn(tokens * TOP, columns, device="cuda", generator=generator).to(torch.bfloat16)

            def cublas():
                y = torch.empty(len(x), out, dtype=x.dtype, device="cuda")
                for e, a, b in used:
                    torch.matmul(x[a:b], weight[e].T, out=y[a:b])
                return y

            table = {
                "public": lambda: gemm.grouped_linear(x, made.packed, made.scale, offsets, backend="cuda"),
                "cublas launched": cublas,
                "kernel": lambda: unchecked(x, made.packed, made.scale, offsets),
                "cublas": cublas,
            }
            if hasattr(torch.nn.functional, "grouped_mm"):
                ends = offsets[1:].to(torch.int32)
                table["grouped_mm"] = lambda: torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
            truth = torch.cat([x[a:b].double() @ weight[e].double().T for e, a, b in used])
            result.append(row("grouped", out, columns, tokens, table, truth, repetitions) | {"experts_used": len(used)})
        del weight, made
    return result


def row(kind, out, columns, tokens, table, truth, repetitions, copies=1) -> dict:
    """One entry of the record: times of one call in ms, how often as fast as the baselines, relative errors.

    copies: calls that each captured row makes.
    """
    errors = {}
    for name in list(table):
        try:
            errors[name] = relative_error(table[name](), truth)
        except Exception as error:
            if name != "grouped_mm":  # which not every GPU has
                raise
            print(f"kernels_gpu: grouped_mm left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del table[name]
    launched = ("public", "cublas launched")
    graphs = {name: (run, False) if name in launched else captured(run) for name, run in table.items()}
    measured = interleaved({name: run for name, (run, _) in graphs.items()}, repetitions, {name: copies for name in table if name not in launched})
    speedup = {name: measured[baseline]["median_ms"] / measured[name]["median_ms"] for name, baseline in (("public", "cublas launched"), ("kernel", "cublas"))}
    if "grouped_mm" in table:
        speedup["kernel_over_grouped_mm"] = measured["grouped_mm"]["median_ms"] / measured["kernel"]["median_ms"]
    return {"kind": kind, "out": out, "in": columns, "tokens": tokens, **measured, "speedup": speedup, "relative_error": errors,
            "captured": {name: graph for name, (_, graph) in graphs.items()}}


def clock_mhz() -> int | None:
    """Clock of the multiprocessors under load, where NVIDIA's management library is there to ask."""
    warm_up()
    try:
        return torch.cuda.clock_rate()
    except Exception:  # of that library's own, many
        return None


def main() -> int:
    """Command line: correctness first, then the measurements, then the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="where to write the JSON record")
    parser.add_argument("--repetitions", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu: this machine has no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    import triton

    generator = torch.Generator("cuda").manual_seed(0)
    try:
        checked = check(generator)
    except AssertionError as error:
        print(f"kernels_gpu: wrong result, nothing was timed: {error}", file=sys.stderr)
        return 1
    record = {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "host": platform.processor(), "clock_mhz": clock_mhz(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "repetitions": options.repetitions, "equal_to_reference": checked, "bandwidth": [], "gemm": [],
    }  # fmt: skip
    for key, section in (("bandwidth", bandwidth), ("gemm", linears), ("gemm", experts)):
        record[key] += section(generator, options.repetitions)
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['device']}, torch {torch.__version__}, triton {triton.__version__}; equal to the reference in {len(checked)} cases")
    for entry in record["bandwidth"]:
        print(f"{entry['name']:32} {entry['median_ms']:9.3f} ms {entry['GB_per_s']:8.0f} GB/s {entry['of_copy']:6.2f} of copy")
    for entry in record["gemm"]:
        print(
            f"{entry['kind']:8} {entry['out']:5} x {entry['in']:5} tokens {entry['tokens']:5}  kernel {entry['kernel']['median_ms']:8.3f} ms"
            f"  cuBLAS BF16 {entry['cublas']['median_ms']:8.3f} ms  speedup {entry['speedup']['kernel']:5.2f}"
            + (f", over grouped_mm {entry['speedup']['kernel_over_grouped_mm']:5.2f}" if "grouped_mm" in entry else "")
            + f", with argument checks {entry['speedup']['public']:5.2f}"
            f"  error {entry['relative_error']['kernel']:.2e} / {entry['relative_error']['cublas']:.2e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
