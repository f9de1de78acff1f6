"""Claim: on one CPU core two or three streams are hashed with SHA-256 in hardly more time than hashlib takes for one.

    python benchmarks/hash_cpu.py [--repetitions 9]

Converting a shard hashes its source and its output. Every row hashes 64 MiB of each of its streams on one thread, from memory that no cache
holds, in pieces as the converter does. Repetitions are interleaved and medians shown; trust the ratios, not the figures.
"""

import argparse
import hashlib
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import sha256  # noqa: E402
from stages.checkpoint.hashing import PIECE_BYTES, one_by_one  # noqa: E402

STREAM_BYTES = 64 << 20


def run(data, new, together):
    """Hashes the streams, a piece of each in turn; returns the digests."""
    digests = [new() for _ in data]
    for begin in range(0, STREAM_BYTES, PIECE_BYTES):
        together([(digest, part[begin:begin + PIECE_BYTES]) for digest, part in zip(digests, data)])
    return [digest.hexdigest() for digest in digests]


def main():
    """Command line: prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    if not sha256.available():
        sys.exit("this processor has no SHA instructions: hashlib is used for everything")
    data = np.random.default_rng(0).integers(0, 256, (sha256.MOST_STREAMS, STREAM_BYTES), dtype=np.uint8)
    rows = {"hashlib, 1 stream": (1, hashlib.sha256, one_by_one)}
    rows |= {f"mxforge, {count} stream{'s' * (count > 1)}": (count, sha256.Sha256, sha256.update_together) for count in range(1, sha256.MOST_STREAMS + 1)}
    seconds = {name: [] for name in rows}
    for repetition in range(options.repetitions + 1):
        for name, (count, new, together) in rows.items():
            start = time.perf_counter()
            digests = run(data[:count], new, together)
            if repetition:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
            else:
                assert digests == [hashlib.sha256(part).hexdigest() for part in data[:count]], name
    print(f"medians of {options.repetitions} interleaved repetitions")
    print(f"{'':22} {'GB/s':>6} {'min..max':>12} {'hashlib takes x times as long':>30}")
    speed = {name: rows[name][0] * STREAM_BYTES / statistics.median(times) / 1e9 for name, times in seconds.items()}
    for name, times in seconds.items():
        size = rows[name][0] * STREAM_BYTES / 1e9
        print(f"{name:22} {speed[name]:6.2f} {size / max(times):5.2f}..{size / min(times):5.2f} {speed[name] / speed['hashlib, 1 stream']:30.2f}")


if __name__ == "__main__":
    main()
