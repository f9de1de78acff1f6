"""The same FP8 checkpoint through llm-compressor and through mxforge, end to end and in turn, warm.

A checkpoint of one layer of routed experts at Step-3.7 shapes (1280 x 4096 and 4096 x 1280, block FP8, stored one by one, the only
layout that llm-compressor reads) is made in a temporary directory. In turn: llm-compressor's model_free_ptq to MXFP4A16 with its
FP8 dequantizer, in the environment of --peer; and mxforge from the directory to the release, all stages from download to assemble_release,
hashes and syncs included, which the peer does without. Printed: medians with and without the time that the peer needs to start.

    python -m venv .venv-peer && .venv-peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/convert_peers.py --peer .venv-peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from convert_cpu import COLUMNS, PROJECT, ROWS, beside_experts, read_into_cache, timed

from stages.checkpoint.header import render_header, sorted_specs

PEER = """
import sys, time
from llmcompressor import model_free_ptq
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
start = time.perf_counter()
model_free_ptq(sys.argv[1], sys.argv[2], scheme="MXFP4A16", ignore=["lm_head"], max_workers=1, device="cpu",
               converter=FP8BlockDequantizer(targets=[r"re:.*mlp\\.experts\\..*"]))
print(f"\\nworked {time.perf_counter() - start}")
"""


def make_source(directory: Path, experts: int) -> int:
    """Writes the checkpoint; returns the bytes of its shard."""
    directory.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, rows, columns in (("gate", ROWS, COLUMNS), ("up", ROWS, COLUMNS), ("down", COLUMNS, ROWS)):
        codes = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = torch.rand(rows // 128, columns // 128, generator=generator) * 1e-4 + 1e-4
        for expert in range(experts):
            prefix = f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
            tensors[prefix], tensors[f"{prefix}_scale_inv"] = ("F8_E4M3", codes.view(torch.uint8)), ("F32", scale)
    for name, shape in beside_experts("mlp", experts).items():
        tensors[name] = ("BF16", torch.ones(shape, dtype=torch.bfloat16).view(torch.int16))
    specs = sorted_specs([(name, dtype, tuple(tensor.shape)) for name, (dtype, tensor) in tensors.items()])
    with open(directory / "model.safetensors", "wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for name, _, _ in specs:
            file.write(tensors[name][1].numpy().tobytes())
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": COLUMNS, "num_experts": experts,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}}))
    return (directory / "model.safetensors").stat().st_size


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of an environment with llm-compressor")
    parser.add_argument("--experts", type=int, default=64, help="of 15.7 MB each")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"llm-compressor": [], "llm-compressor, after its start": [], "mxforge, all stages": [],
                                       "mxforge, its shard": []}
    memory: dict[str, list[int]] = {"llm-compressor": [], "mxforge, its shard": []}
    with tempfile.TemporaryDirectory(dir=PROJECT / "results") as temporary:
        size = make_source(Path(temporary) / "source", arguments.experts)
        settings = ["source=local", f"source.path={temporary}/source", f"results={temporary}/results"]
        for _ in range(arguments.repetitions):
            shutil.rmtree(f"{temporary}/peer", ignore_errors=True)
            shutil.rmtree(f"{temporary}/results", ignore_errors=True)
            read_into_cache(Path(temporary) / "source" / "model.safetensors")
            took, resident, output = timed([arguments.peer, "-c", PEER, f"{temporary}/source", f"{temporary}/peer"])
            seconds["llm-compressor"].append(took)
            memory["llm-compressor"].append(resident)
            seconds["llm-compressor, after its start"].append(float(output.rpartition("worked")[2]))
            read_into_cache(Path(temporary) / "source" / "model.safetensors")
            total = 0.0
            for stage in ("download --metadata", "inspect_format", "plan", "download --shard model.safetensors",
                          "quantize_experts --shard model.safetensors", "assemble_release"):
                name, *extra = stage.split()
                took, resident, _ = timed([sys.executable, "-m", f"stages.{name}", *settings, *extra])
                total += took
                if name == "quantize_experts":
                    seconds["mxforge, its shard"].append(took)
                    memory["mxforge, its shard"].append(resident)
            seconds["mxforge, all stages"].append(total)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{size / 1e9:.2f} GB of block FP8, warm; medians of {arguments.repetitions}, taken in turn")
    for name, median in medians.items():
        print(f"{name:31} {median:7.1f} s  {size / median / 1e6:7.1f} MB/s of source")
    print("peak resident memory: " + ", ".join(f"{name} {max(values) / 1e6:.0f} MB" for name, values in memory.items()))
    print(f"end to end: {medians['llm-compressor'] / medians['mxforge, all stages']:.1f} times as fast; without the peer's start against our "
          f"whole process for the shard: {medians['llm-compressor, after its start'] / medians['mxforge, its shard']:.1f}")


if __name__ == "__main__":
    main()
