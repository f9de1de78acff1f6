"""Claim: the serving benchmark counts what the server counts, and agrees with vLLM's own benchmark where both mean the same.

    python benchmarks/serve_cpu.py [--streams 8] [--repetitions 3] [--record FILE]

One vLLM on the CPU serves the tiny release (`make`, `make serve-env` first). In turn, `--repetitions` times: our closed loop
over one window, and `vllm bench serve` with as many requests as keep it busy for about as long, the same number in flight,
prompts and completions of the same length. Printed: medians of tokens per second, their ratio, and ours over the server's
own counter.

vLLM's figure is all tokens over the whole time, ramp and drain included: while its last requests end, fewer than N run. So it
reads somewhat lower, by about half a request's time per run, which `--requests-per-stream` makes small.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.errors import exit_with_one_line  # noqa: E402
from stages.serving.launcher import executable, server  # noqa: E402
from stages.serving.load import ClosedLoop  # noqa: E402
from stages.serving.statistics import figures  # noqa: E402
from stages.settings import load  # noqa: E402

OUTPUT_TOKENS, PROMPT_TOKENS = 128, 32


def ours(running, streams: int, seconds: float, seed: int) -> dict:
    """One window of the closed loop."""
    loop = ClosedLoop(running, streams=streams, output_tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, vocabulary=512,
                      seed=seed, timeout_seconds=300.0)
    asyncio.run(loop.run(1, seconds, 3.0))
    return figures(loop.events, streams=streams, output_tokens=OUTPUT_TOKENS)


def theirs(settings, running, release: Path, streams: int, requests: int, seed: int) -> dict:
    """`vllm bench serve` against the same server."""
    with tempfile.TemporaryDirectory() as directory:
        command = [str(executable(settings)), "bench", "serve", "--backend", "openai", "--base-url", running.base_url,
                   "--endpoint", "/v1/completions", "--model", running.model, "--tokenizer", str(release),
                   "--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS),
                   "--ignore-eos", "--num-prompts", str(requests), "--max-concurrency", str(streams), "--seed", str(seed),
                   "--temperature", "0", "--save-result", "--result-dir", directory, "--result-filename", "result.json"]
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings.serving.variables})
        if process.returncode:
            sys.exit(process.stdout[-2000:] + process.stderr[-2000:])
        return json.loads((Path(directory) / "result.json").read_text())


@exit_with_one_line
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of our window")
    parser.add_argument("--requests-per-stream", type=int, default=8, help="of vLLM's benchmark")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--record", type=Path, help="write the raw figures to this JSON file")
    options = parser.parse_args()
    settings = load(["serving=vllm_cpu"])
    release = settings.run_directory / "release"
    rows = {"ours": [], "server": [], "vllm": []}
    with server(settings, release) as running:
        version = running.facts["version"]
        for repetition in range(options.repetitions):
            found = ours(running, options.streams, options.seconds, 10 + repetition)
            window = found["windows"][0]
            rows["ours"].append(window["tokens_per_second"])
            rows["server"].append(window["server_tokens"] / (window["end"] - window["begin"]))
            result = theirs(settings, running, release, options.streams, options.streams * options.requests_per_stream, repetition)
            rows["vllm"].append(result["output_throughput"])
    medians = {name: statistics.median(values) for name, values in rows.items()}
    print(f"vLLM {version}, {options.streams} streams, {OUTPUT_TOKENS} tokens each; medians of {options.repetitions}, taken in turn")
    for name, title in (("ours", "closed loop, steady window"), ("server", "server's counter, same window"), ("vllm", "vllm bench serve")):
        print(f"{title:32} {medians[name]:8.1f} tokens/s   ({min(rows[name]):.1f} to {max(rows[name]):.1f})")
    agreement = [a / b for a, b in zip(rows["ours"], rows["server"])]
    ratio = statistics.median(a / b for a, b in zip(rows["ours"], rows["vllm"]))
    print(f"ours / server's counter: {min(agreement):.4f} to {max(agreement):.4f}")
    print(f"ours / vllm bench serve: {ratio:.3f}")
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps({
            "benchmark": "serve_cpu", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "vllm": version,
            "streams": options.streams, "output_tokens": OUTPUT_TOKENS, "prompt_tokens": PROMPT_TOKENS,
            "window_seconds": options.seconds, "tokens_per_second": rows, "ours_over_server": agreement,
            "ours_over_vllm_bench": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
