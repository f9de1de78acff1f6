"""Claim: on one CPU core mxforge converts block-FP8 experts to MXFP4 faster than the tensor code of other tools.

    python benchmarks/quantize_cpu.py [--experts 4] [--repetitions 7]

Every row handles the same weights in the same process on one thread. Repetitions are interleaved (row 1, row 2, ..., again)
and medians are shown, so that a neighbour's load on a shared machine hits all rows alike; trust the ratios, not the figures.
GB/s counts source bytes, one per FP8 weight. Rows that start from BF16 or float32 get the decoded tensor for free.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels.fp8 import decode_block_fp8  # noqa: E402
from kernels.mxfp4 import RULES, quantize  # noqa: E402


def experts(count: int, out: int = 1280, columns: int = 4096):
    """Gaussian block-FP8 experts as a quantizer writes them: the largest weight of each 128x128 tile becomes 448."""
    weight = torch.randn(count, out, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = weight.view(count, out // 128, 128, columns // 128, 128).abs().amax((2, 4)) / 448
    codes = (weight / scale.repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :columns]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def torch_floor(codes, scale):
    """Plain torch for one expert: decode, floor exponent, round, pack, without checks; also what torch.compile is given."""
    out, columns = codes.shape
    tiles = codes.float().view(out // 128, 128, columns // 128, 128) * scale[:, None, :, None]
    blocks = tiles.reshape(out, columns // 32, 32)
    magnitude = blocks.abs()
    e = (magnitude.amax(-1).view(torch.int32) >> 23) - 129
    u = magnitude * ((127 - e) << 23).view(torch.float32).unsqueeze(-1)
    code = (u > 0.25).to(torch.uint8) + (u >= 0.75).to(torch.uint8) + (u > 1.25).to(torch.uint8) + (u >= 1.75).to(torch.uint8)
    code = code + (u > 2.5).to(torch.uint8) + (u >= 3.5).to(torch.uint8) + (u > 5.0).to(torch.uint8)
    code = (code | (blocks.signbit().to(torch.uint8) << 3)).view(out, columns // 2, 2)
    return code[..., 0] | (code[..., 1] << 4), (e + 127).to(torch.uint8)


def checked(function, codes, scale):
    """`function`, after its bytes for the first expert were compared with ours."""
    ours = quantize(codes[0], scale[0], rule="ocp_floor")
    packed, exponents = function(codes[0], scale[0])
    assert torch.equal(packed, ours.packed) and torch.equal(exponents, ours.scale), "not the same bytes"
    return lambda: [function(*expert) for expert in zip(codes, scale)]


def written_and_synced(codes, directory):
    """Writes the source's bytes to a file and waits until they are on the disk."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(memoryview(codes.view(torch.uint8).numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def rows(count: int, directory: Path):
    """name -> function without arguments, or the reason why there is none."""
    codes, scale = experts(count)
    table = {
        "memory copy of the source": lambda target=torch.empty_like(codes): target.copy_(codes),
        "the source written to disk and synced": lambda: written_and_synced(codes, directory),
    }
    for rule in RULES:
        table[f"mxforge, rule {rule}"] = lambda rule=rule: quantize(codes, scale, rule=rule)
    table["torch eager, floor"] = checked(torch_floor, codes, scale)
    try:
        table["torch.compile, floor"] = checked(torch.compile(torch_floor), codes, scale)
    except Exception as error:  # noqa: BLE001 - whatever the compiler lacks here
        table["torch.compile, floor"] = f"skipped: {str(error).splitlines()[0]}"
    wide = decode_block_fp8(codes, scale)
    try:
        from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

        for mode in ("FLOOR", "EVEN", "RCEIL"):
            mode = getattr(ScaleCalculationMode, mode)
            table[f"torchao to_mx, {mode.name}, from float32"] = lambda mode=mode: [
                to_mx(w, torch.float4_e2m1fn_x2, 32, mode) for w in wide
            ]
    except ImportError as error:
        table["torchao to_mx"] = f"skipped: {error}"
    try:  # llm-compressor's model_free_ptq ends in this compressor
        from compressed_tensors.compressors import MXFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        weights = QuantizationArgs(num_bits=4, type="float", group_size=32, strategy="group", symmetric=True, scale_dtype=torch.uint8)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        half = wide.to(torch.bfloat16)

        def compress():
            for w in half:
                amax = w.unflatten(1, (-1, 32)).abs().amax(-1)
                block_scale, _ = calculate_qparams(-amax, amax, weights)
                MXFP4PackedCompressor.compress({"weight": w, "weight_scale": block_scale.to(w.dtype)}, scheme)

        table["compressed-tensors (llm-compressor), from BF16"] = compress
    except ImportError as error:
        table["compressed-tensors (llm-compressor)"] = f"skipped: {error}"
    return table, codes.numel()


def main():
    """Command line: prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=2, help="experts of 1280 x 4096 weights")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(__file__).resolve().parents[1] / "results", help="where the disk to measure is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table, size = rows(options.experts, options.directory)
    seconds = {name: [] for name, run in table.items() if callable(run)}
    for repetition in range(options.repetitions + 1):
        for name in seconds:
            start = time.perf_counter()
            table[name]()
            if repetition:  # the first one compiles and warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    copy, ours = medians["memory copy of the source"], medians["mxforge, rule mse"]
    print(f"{options.experts} experts of 1280 x 4096 block-FP8 weights ({size / 1e6:.1f} MB), 1 thread, torch {torch.__version__},")
    print(f"medians of {options.repetitions} interleaved repetitions\n")
    print(f"{'':48} {'GB/s':>8} {'min..max':>15} {'mse is x faster':>16} {'of copy':>9}")
    for name, run in table.items():
        if name not in medians:
            print(f"{name:48} {run}")
            continue
        spread = f"{size / max(seconds[name]) / 1e9:.3f}..{size / min(seconds[name]) / 1e9:.3f}"
        print(f"{name:48} {size / medians[name] / 1e9:8.3f} {spread:>15} {medians[name] / ours:16.2f} {copy / medians[name]:9.4f}")


if __name__ == "__main__":
    main()
