"""The same FP8 checkpoint through llm-compressor and through mxforge, end to end and in turn, warm.

A checkpoint of --layers layers of routed experts at Step-3.7 shapes (1280 x 4096 and 4096 x 1280, block FP8, stored one by one, the only
layout that llm-compressor reads), each a shard, is made in a temporary directory. In turn: llm-compressor's model_free_ptq to MXFP4A16 with
its FP8 dequantizer, in the environment of --peer, one shard at a time on all cores, as its memory of three times a shard asks for; and mxforge
from the directory to the release, all stages from download to assemble_release, as many shards at a time as there are cores, which is how
Snakemake runs them, hashes and syncs included, which the peer does without; mxforge before and after each run of the peer. Printed: medians with and without
the time that the peer needs to start.

    python -m venv .venv-peer && .venv-peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/convert_peers.py --peer .venv-peer/bin/python --experts 256 --layers 4 --repetitions 1   # 16 GB, 14 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from convert_cpu import COLUMNS, PROJECT, ROWS, beside_experts, read_into_cache, timed

from stages.checkpoint.header import render_header, sorted_specs
from stages.settings import load
from stages.settings.handed_over import VARIABLE, hand_over

PEER = """
import sys, time
from llmcompressor import model_free_ptq
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
start = time.perf_counter()
model_free_ptq(sys.argv[1], sys.argv[2], scheme="MXFP4A16", ignore=["lm_head"], max_workers=1, device="cpu",
               converter=FP8BlockDequantizer(targets=[r"re:.*mlp\\.experts\\..*"]))
print(f"\\nworked {time.perf_counter() - start}")
"""


def make_source(directory: Path, experts: int, layers: int) -> int:
    """Writes the checkpoint; returns the bytes of its shards."""
    directory.mkdir()
    generator, total, places = torch.Generator().manual_seed(0), 0, {}
    for layer in range(layers):
        tensors = {}
        for name, rows, columns in (("gate", ROWS, COLUMNS), ("up", ROWS, COLUMNS), ("down", COLUMNS, ROWS)):
            codes = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            scale = torch.rand(rows // 128, columns // 128, generator=generator) * 1e-4 + 1e-4
            for expert in range(experts):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                tensors[prefix], tensors[f"{prefix}_scale_inv"] = ("F8_E4M3", codes.view(torch.uint8)), ("F32", scale)
        for name, shape in beside_experts("mlp", experts).items():
            if layer == 0 or ".layers." in name:
                tensors[name.replace(".layers.0.", f".layers.{layer}.")] = "BF16", torch.ones(shape, dtype=torch.bfloat16).view(torch.int16)
        specs = sorted_specs([(name, dtype, tuple(tensor.shape)) for name, (dtype, tensor) in tensors.items()])
        path = directory / shard_name(layer)
        with open(path, "wb") as file:
            file.write(render_header(specs, {"format": "pt"}))
            for name, _, _ in specs:
                file.write(tensors[name][1].numpy().tobytes())
        total += path.stat().st_size
        places |= dict.fromkeys(tensors, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": layers, "hidden_size": COLUMNS, "num_experts": experts,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}}))
    return total


def shard_name(layer: int) -> str:
    """File name of a layer's shard."""
    return f"model-{layer + 1:05}.safetensors"


def run_stages(settings: list[str], shards: list[str]) -> tuple[float, float, int]:
    """All stages of mxforge as the Snakefile runs them for a local source, settings composed once: wall seconds of all, longest of converting a
    shard, and peak resident bytes of a process that did."""
    def stage(name, *extra):
        return timed([sys.executable, "-m", f"stages.{name}", *settings, *extra])

    start = time.perf_counter()
    os.environ.pop(VARIABLE, None)  # what the run before handed over
    hand_over(settings, load(settings))
    for command in (["download", "--metadata"], ["inspect_format"], ["plan"]):
        stage(*command)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        converted = list(pool.map(lambda shard: stage("quantize_experts", "--shard", shard), shards))
    stage("assemble_release")
    return time.perf_counter() - start, max(took for took, _, _ in converted), max(resident for _, resident, _ in converted)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of an environment with llm-compressor")
    parser.add_argument("--experts", type=int, default=64, help="of 15.7 MB each")
    parser.add_argument("--layers", type=int, default=1, help="a shard each")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"llm-compressor": [], "llm-compressor, after its start": [], "mxforge, all stages": [],
                                       "mxforge, a shard": []}
    memory: dict[str, list[int]] = {"llm-compressor": [], "mxforge, a shard": []}
    shards = [shard_name(layer) for layer in range(arguments.layers)]
    with tempfile.TemporaryDirectory(dir=PROJECT / "results") as temporary:
        size = make_source(Path(temporary) / "source", arguments.experts, arguments.layers)
        settings = ["source=local", f"source.path={temporary}/source", f"results={temporary}/results"]
        for _ in range(arguments.repetitions):
            for turn in ("mxforge", "llm-compressor", "mxforge"):
                for shard in shards:
                    read_into_cache(Path(temporary) / "source" / shard)
                if turn == "mxforge":
                    shutil.rmtree(f"{temporary}/results", ignore_errors=True)
                    took, converting, resident = run_stages(settings, shards)
                    seconds["mxforge, all stages"].append(took)
                    seconds["mxforge, a shard"].append(converting)
                    memory["mxforge, a shard"].append(resident)
                else:
                    shutil.rmtree(f"{temporary}/peer", ignore_errors=True)
                    took, resident, output = timed([arguments.peer, "-c", PEER, f"{temporary}/source", f"{temporary}/peer"])
                    seconds["llm-compressor"].append(took)
                    seconds["llm-compressor, after its start"].append(float(output.rpartition("worked")[2]))
                    memory["llm-compressor"].append(resident)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{size / 1e9:.2f} GB of block FP8 in {len(shards)} shards, warm; medians of {arguments.repetitions}, taken in turn")
    for name, median in medians.items():
        work = size / len(shards) if name == "mxforge, a shard" else size
        print(f"{name:31} {median:7.1f} s  {work / median / 1e6:7.1f} MB/s of source   ({min(seconds[name]):.1f} to {max(seconds[name]):.1f} s)")
    print("peak resident memory: " + ", ".join(f"{name} {max(values) / 1e6:.0f} MB" for name, values in memory.items()))
    ratio = medians["llm-compressor"] / medians["mxforge, all stages"]
    print(f"end to end: {ratio:.1f} times as fast; without the peer's start: "
          f"{medians['llm-compressor, after its start'] / medians['mxforge, all stages']:.1f}")


if __name__ == "__main__":
    main()
