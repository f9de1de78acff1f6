"""Claim: on a GPU the Triton kernels write the reference's bytes at a stated fraction of memory bandwidth.

    python benchmarks/kernels_gpu.py --record benchmarks/records/<name>.json

Needs a CUDA device, torch and triton. Correctness first: a wrong byte ends the run with exit status 1 before anything is
timed. Then, in one run: quantize and dequantize as fractions of a device-to-device copy that moves as many bytes, and the
GEMMs against cuBLAS in BF16 on the decoded weights (which read four times the bytes), with errors against float64; "triton" is
the public function, which reads the scales and waits to refuse bad arguments, "kernel" is what it calls when they are good. Grouped
cuBLAS is one matmul per expert that has rows, its offsets known to the host beforehand.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import gemm, mxfp4  # noqa: E402

SHAPES = [(4096, 1280), (1280, 4096)]  # out, in: Step-3.7's down and gate/up projections
TOKENS = [1, 8, 32, 128, 1024]
EXPERTS, TOP = 288, 8


def block_fp8(shape, generator):
    """Random codes without NaN, random scales; on the device."""
    codes = torch.randint(0, 127, shape, device="cuda", dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, shape, device="cuda", dtype=torch.uint8, generator=generator) << 7
    tiles = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scale = (torch.rand(tiles, device="cuda", generator=generator) + 0.1) * 1e-4
    return codes.view(torch.float8_e4m3fn), scale


def check(generator) -> list[str]:
    """Bytes against the reference; raises AssertionError with the number of wrong ones."""
    done = []
    for shape in ((3, 200, 288), (2, 1280, 4096), (5, 123 * 32)):
        codes, scale = block_fp8(shape, generator)
        for rule in mxfp4.RULES:
            got = mxfp4.quantize(codes, scale, rule=rule, backend="cuda")
            truth = mxfp4.quantize(codes.cpu(), scale.cpu(), rule=rule, backend="reference")
            for field in ("packed", "scale"):
                wrong = int((getattr(got, field).cpu() != getattr(truth, field)).sum())
                assert wrong == 0, f"{shape} rule {rule}: {wrong} wrong bytes in {field}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                a = mxfp4.dequantize(got.packed, got.scale, dtype, backend="cuda").cpu()
                assert torch.equal(a, mxfp4.dequantize(truth.packed, truth.scale, dtype, backend="reference")), f"{shape} {dtype}"
            done.append(f"{shape} {rule}")
    return done


def interleaved(table: dict, repetitions: int) -> dict:
    """name -> {median_ms, min_ms, max_ms} by CUDA events; each repetition runs every row, after a flush of the L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = {name: [] for name in table}
    for repetition in range(repetitions + 3):
        for name, run in table.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if repetition >= 3:
                times[name].append(start.elapsed_time(end))
    return {n: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for n, t in times.items()}


def bandwidth(generator, repetitions: int) -> list[dict]:
    """Kernels through their public functions: with the finiteness checks and, in quantize, a synchronization."""
    codes, scale = block_fp8((32, 1280, 4096), generator)
    made = mxfp4.quantize(codes, scale, backend="cuda")
    small = made.packed.numel() + made.scale.numel()
    moved = {f"quantize FP8, rule {rule}": codes.numel() + small for rule in mxfp4.RULES}
    moved |= {"dequantize to BF16": small + 2 * codes.numel(), "dequantize to float32": small + 4 * codes.numel()}
    table = {f"quantize FP8, rule {rule}": lambda rule=rule: mxfp4.quantize(codes, scale, rule=rule, backend="cuda") for rule in mxfp4.RULES}
    table["dequantize to BF16"] = lambda: mxfp4.dequantize(made.packed, made.scale, torch.bfloat16, backend="cuda")
    table["dequantize to float32"] = lambda: mxfp4.dequantize(made.packed, made.scale, torch.float32, backend="cuda")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    table["copy"] = lambda: target.copy_(source)
    moved["copy"] = 2 * source.numel()
    measured = interleaved(table, repetitions)
    rate = {name: moved[name] / row["median_ms"] / 1e6 for name, row in measured.items()}
    return [{"name": n, **row, "GB_per_s": rate[n], "of_copy": rate[n] / rate["copy"]} for n, row in measured.items()]


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
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda", generator=generator).to(torch.bfloat16)
            offsets = torch.tensor([0, tokens], device="cuda")
            table = {
                "triton": lambda: gemm.linear(x, made.packed, made.scale, backend="cuda"),
                "kernel": lambda: unchecked(x, made.packed[None], made.scale[None], offsets),
                "cublas": lambda: x @ weight.T,
            }
            measured, truth = interleaved(table, repetitions), x.double() @ weight.double().T
            errors = {name: relative_error(run(), truth) for name, run in table.items()}
            result.append(row("linear", out, columns, tokens, measured, errors))
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
                "triton": lambda: gemm.grouped_linear(x, made.packed, made.scale, offsets, backend="cuda"),
                "kernel": lambda: unchecked(x, made.packed, made.scale, offsets),
                "cublas": cublas,
            }
            measured = interleaved(table, repetitions)
            truth = torch.cat([x[a:b].double() @ weight[e].double().T for e, a, b in used])
            errors = {name: relative_error(run(), truth) for name, run in table.items()}
            result.append(row("grouped", out, columns, tokens, measured, errors) | {"experts_used": len(used)})
        del weight, made
    return result


def row(kind, out, columns, tokens, measured, errors) -> dict:
    """One entry of the record: times in ms, how often faster than cuBLAS, relative errors."""
    speedup = {name: measured["cublas"]["median_ms"] / measured[name]["median_ms"] for name in ("triton", "kernel")}
    return {"kind": kind, "out": out, "in": columns, "tokens": tokens, **measured, "speedup": speedup, "relative_error": errors}


def main() -> int:
    """Command line: correctness first, then the measurements, then the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="where to write the JSON record")
    parser.add_argument("--repetitions", type=int, default=20)
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
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "host": platform.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "repetitions": options.repetitions, "bytes_equal_to_reference": checked,
        "bandwidth": bandwidth(generator, options.repetitions),
        "gemm": linears(generator, options.repetitions) + experts(generator, options.repetitions),
    }  # fmt: skip
    print(f"{record['device']}, torch {torch.__version__}, triton {triton.__version__}; bytes equal in {len(checked)} cases")
    for entry in record["bandwidth"]:
        print(f"{entry['name']:32} {entry['median_ms']:9.3f} ms {entry['GB_per_s']:8.0f} GB/s {entry['of_copy']:6.2f} of copy")
    for entry in record["gemm"]:
        print(
            f"{entry['kind']:8} {entry['out']:5} x {entry['in']:5} tokens {entry['tokens']:5}  triton {entry['triton']['median_ms']:8.3f} ms"
            f"  cuBLAS BF16 {entry['cublas']['median_ms']:8.3f} ms  speedup {entry['speedup']['triton']:5.2f}"
            f", of the kernel alone {entry['speedup']['kernel']:5.2f}"
            f"  error {entry['relative_error']['triton']:.2e} / {entry['relative_error']['cublas']:.2e}"
        )
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
