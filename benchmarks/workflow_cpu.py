"""The whole workflow on shards of Step-3.7's shapes: from a directory to a proven release with its report, hashes and syncs included.

A checkpoint with the tensors of Step-3.7-Flash's first layers (three dense ones, then --layers with 288 experts of 4.5 GB each), its
embeddings and its head is made in a temporary directory, and converted by the same snakemake command as any: every stage but serving, on
all cores; then `mxforge verify` compares the two. Printed: seconds of the whole and of each stage, as Snakemake started and ended them, and bytes of source per second.

    python benchmarks/workflow_cpu.py --layers 3        # 17.8 GB, and as much again in the page cache and the release
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from stages.checkpoint.header import DTYPE_BYTES, render_header, sorted_specs  # noqa: E402
from tests import step37_flash  # noqa: E402

DENSE_LAYERS = 3
PIECE = 32 << 20  # bytes written at once


def make_source(directory: Path, layers: int) -> int:
    """Writes the checkpoint; returns its bytes. Numbers repeat, their order differs from tensor to tensor."""
    import torch

    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(PIECE, generator=generator)
    pieces = {"F8_E4M3": (gaussian * 80).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy(),
              "BF16": (gaussian[:PIECE // 2] * 0.02).to(torch.bfloat16).view(torch.uint8).numpy(),
              "F32": (torch.rand(PIECE // 4, generator=generator) * 1e-4 + 1e-4).view(torch.uint8).numpy()}
    total, count = 0, 0
    for shard, entries in step37_flash.tensors().items():
        found = [(name, dtype, shape) for name, (dtype, shape) in entries.items()
                 if not name.startswith(("vision_model", "vit_")) and int((re.match(r"model\.layers\.(\d+)", name) or [0, 0])[1]) < DENSE_LAYERS + layers]
        if not found:
            continue
        specs = sorted_specs(found)
        with open(directory / shard, "wb") as file:
            file.write(render_header(specs, {"format": "pt"}))
            for _, dtype, shape in specs:
                left = math.prod(shape) * DTYPE_BYTES[dtype]
                while left:
                    count += 1
                    piece = np.roll(pieces[dtype], 4096 * count)[:left]
                    file.write(piece.tobytes())
                    left -= len(piece)
        total += (directory / shard).stat().st_size
    config = step37_flash.config(True)
    config["text_config"] |= {"num_hidden_layers": DENSE_LAYERS + layers, "num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((PROJECT / "tests" / "tiny" / "step37_tiny" / name).read_bytes())
    return total


def seconds_of_stages(log: str) -> dict[str, float]:
    """From the first start to the last end of the jobs of each stage, as Snakemake's log has them, in whole seconds."""
    rules, begun, ended, now = {}, {}, {}, None
    for line in log.splitlines():
        if match := re.match(r"\[(\w{3} \w{3} +\d+ [\d:]{8} \d{4})\]", line):
            now = datetime.strptime(match[1], "%a %b %d %H:%M:%S %Y").timestamp()
        elif match := re.match(r"(?:local)?rule (\w+):", line):
            rule = match[1]
            begun.setdefault(rule, now)
        elif match := re.match(r"\s+jobid: (\d+)", line):
            rules[match[1]] = rule
        elif match := re.match(r"Finished jobid: (\d+)", line):
            ended[rules[match[1]]] = now
    return {rule: ended[rule] - begun[rule] for rule in begun if rule in ended and rule != "all"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="with experts; 4.5 GB each")
    parser.add_argument("--directory", type=Path, default=PROJECT / "results", help="on whose disk all is made")
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        size = make_source(Path(temporary) / "source", arguments.layers)
        command = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "host", "--nocolor", "--config", "source=local", "serving=none",
                   f"results={temporary}/results", f"overrides=[\"source.path={temporary}/source\"]"]
        start = time.monotonic()
        ran = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        took = time.monotonic() - start
        if ran.returncode:
            sys.exit(ran.stdout[-4000:])
        made = Path(temporary, "results/source/mxfp4_experts/release")
        release = sum(path.stat().st_size for path in made.iterdir() if path.is_file())
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "stages.command_line", "verify", str(made), "--source", f"{temporary}/source"], cwd=PROJECT,
                       stdout=subprocess.DEVNULL, check=True)
        verified = time.monotonic() - start
    print(f"{size / 1e9:.1f} GB of source -> {release / 1e9:.1f} GB, proven, in {took:.0f} s: {size / took / 1e6:.0f} MB/s")
    for rule, seconds in seconds_of_stages(ran.stdout).items():
        print(f"    {rule:18} {seconds:4.0f} s")
    print(f"mxforge verify RELEASE --source SOURCE, which computes every SQNR anew: {verified:.0f} s")


if __name__ == "__main__":
    main()
