"""What converting a shard costs beside copying it: whole processes, cold start included, data synced to disk.

A shard of routed experts at Step-3.7 shapes (1280 x 4096 and 4096 x 1280, block FP8) is made in a temporary directory on the
disk of --directory. In turn, `--repetitions` times: one process runs the quantize_experts stage (start, read, convert, hash,
write, fsync), one copies the same source bytes and syncs them, and one does the bare work on them in this order: read a matrix,
convert it, write it, without hashes, sync or the process's start; each writes a new file. Printed: medians, their ratios, and the converter's peak
resident memory. With --cold the source is dropped from the page cache before each, as it is when a shard was downloaded long
ago; without, both read from the page cache and the disk is in the figures through what is written and synced.

    python benchmarks/convert_cpu.py --experts 256 --cold      # 4 GB; a shard of Step-3.7 has 8 GB
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from stages.checkpoint.header import render_header, sorted_specs  # noqa: E402

ROWS, COLUMNS = 1280, 4096
COPY = ("import os, shutil, sys\n"
        "with open(sys.argv[1], 'rb') as a, open(sys.argv[2], 'wb') as b:\n"
        "    shutil.copyfileobj(a, b, 8 << 20); b.flush(); os.fsync(b.fileno())\n")


BARE = """
import hashlib, sys, time
import numpy as np
from kernels.mxfp4.cpu import quantize_matrix
from stages.checkpoint import writer
from stages.checkpoint.files import memory
from stages.checkpoint.hashing import HashingThread
from stages.checkpoint.reader import ShardReader

writer.os.fdatasync = writer.os.fsync = lambda handle: None
reader, buffer, packed = ShardReader(sys.argv[1]), memory(8 << 20), np.empty((1280 * 4096) // 2, np.uint8)
quantize_matrix(np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float32))  # loads the kernel
start = time.perf_counter()
names = [name for name in reader.header.tensors if ".moe." in name and name.endswith("proj.weight")]
shapes = {name: reader.info(name).shape for name in names}
specs = [spec for name in names for spec in ((name, "U8", (*shapes[name][:2], shapes[name][2] // 2)),
                                             (name + "_scale", "U8", (*shapes[name][:2], shapes[name][2] // 32)))]
with HashingThread(hashlib.sha256, lambda updates: None) as hashing, writer.ShardWriter(sys.argv[2], specs, None, hashing=hashing) as output:
    for name in names:
        scales = []
        for expert in range(shapes[name][0]):
            weight = reader.matrix_array(name, expert, 0, shapes[name][1], buffer)
            scale = reader.matrix_array(name + "_scale_inv", expert, 0, shapes[name][1] // 128)
            codes, made, _ = quantize_matrix(weight, scale, packed=packed.reshape(shapes[name][1], -1))
            output.write(name, codes)
            scales.append(made)
        for made in scales:
            output.write(name + "_scale", made)
print(time.perf_counter() - start)
"""


def beside_experts(block: str, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model of one layer has beside its routed experts, small; all BF16."""
    layer = "model.layers.0"
    return {"model.embed_tokens.weight": (32, COLUMNS), "model.norm.weight": (COLUMNS,), "lm_head.weight": (32, COLUMNS),
            **{f"{layer}.self_attn.{name}_proj.weight": (32, COLUMNS) for name in "qkv"}, f"{layer}.self_attn.o_proj.weight": (COLUMNS, 32),
            f"{layer}.{block}.gate.weight": (experts, COLUMNS)}


def make_source(directory: Path, experts: int) -> Path:
    """One shard with one layer of `experts` routed experts: gaussian weights, one scale per tile."""
    directory.mkdir()
    shapes = {"gate": (ROWS, COLUMNS), "up": (ROWS, COLUMNS), "down": (COLUMNS, ROWS)}
    specs = sorted_specs([(name, "BF16", shape) for name, shape in beside_experts("moe", experts).items()] + [(f"model.layers.0.moe.{name}_proj.{part}", dtype, shape)
                          for name, (rows, columns) in shapes.items()
                          for part, dtype, shape in (("weight", "F8_E4M3", (experts, rows, columns)),
                                                     ("weight_scale_inv", "F32", (experts, rows // 128, columns // 128)))])
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(ROWS * COLUMNS, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.rand(ROWS // 128 * (COLUMNS // 128), generator=generator) * 1e-4 + 1e-4
    path = directory / "model-00001.safetensors"
    with open(path, "wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for _, dtype, shape in specs:
            if dtype == "BF16":
                file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
                continue
            for _ in range(shape[0]):
                file.write((codes.view(torch.uint8) if dtype == "F8_E4M3" else scales).numpy().tobytes())
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["Step3p7ForConditionalGeneration"], "text_config": {"num_hidden_layers": 1},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}))
    return path


def drop_from_cache(path: Path) -> None:
    """Makes the kernel forget a file's pages, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(path: Path) -> None:
    """Reads a file once, so that the next read comes from the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def timed(command: list[str]) -> tuple[float, int, str]:
    """(wall seconds, peak resident bytes, output) of a process; its output is shown only if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(output)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="of 15.7 MB each")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each run")
    parser.add_argument("--directory", type=Path, default=PROJECT / "results", help="where the disk to measure is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        source = make_source(Path(temporary) / "source", arguments.experts)
        settings = ["source=local", f"source.path={source.parent}", f"results={temporary}/results"]

        def stage(name, *extra):
            return [sys.executable, "-m", f"stages.{name}", *settings, *extra]

        for command in (stage("download", "--metadata"), stage("inspect_format"), stage("plan")):
            timed(command)
        convert = stage("quantize_experts", "--shard", source.name)
        copy = [sys.executable, "-c", COPY, str(source), f"{temporary}/copy"]
        timed(convert)  # compiles the kernel where it is not cached yet
        bare = [sys.executable, "-c", BARE, str(source), f"{temporary}/bare"]
        seconds: dict[str, list[float]] = {"convert": [], "copy": [], "bare work": []}
        memory = []
        for _ in range(arguments.repetitions):
            for name, command in (("convert", convert), ("copy", copy), ("bare work", bare)):
                for made in (f"{temporary}/copy", f"{temporary}/bare", *Path(temporary).glob(f"results/*/*/shards/{source.name}")):
                    Path(made).unlink(missing_ok=True)
                (drop_from_cache if arguments.cold else read_into_cache)(source)
                took, resident, output = timed(command)
                seconds[name].append(float(output) if command is bare else took)
                if name == "convert":
                    memory.append(resident)
        size = source.stat().st_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"source shard: {size / 1e9:.2f} GB of block FP8; {'cold' if arguments.cold else 'warm'}; medians of {arguments.repetitions}, taken in turn")
    for name, median in medians.items():
        print(f"{name:9} {median:7.2f} s  {size / median / 1e6:8.0f} MB/s of source   "
              f"({min(seconds[name]):.2f} to {max(seconds[name]):.2f} s)")
    print(f"convert / copy: {medians['convert'] / medians['copy']:.2f}")
    print(f"peak resident memory of the converter: {max(memory) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
