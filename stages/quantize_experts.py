"""Converts one shard: quantizes what the plan says, passes everything else through byte for byte, writes a receipt.

A shard is streamed in the order of the output file, one expert's matrix (or a panel of rows) at a time, so that resident
memory does not grow with the shard, but for MXFP8's scales, a byte per 32 weights, which the file has behind all codes. One thread converts; others hash the source (which also reads it ahead), hash the output
and write it (stages/checkpoint/writer.py). Bytes depend on the source and the recipe only: not on the backend, the number of
workers, or how often the run was interrupted. Converting itself stays in one thread: one process per shard keeps cores busier
than threads inside one.

The receipt is what later stages trust: sha256 of the source and of the output, of every tensor that passed through, of scales that one shard
lends to another, and for every quantized matrix the sums of squares of the signal, of the error and of what it decodes to.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from kernels.decibels import decibels
from stages.checkpoint.files import check_disk, human_bytes, sha256_file, write_json
from stages.checkpoint.reader import ShardReader
from stages.checkpoint.writer import ShardWriter
from stages.conversion.numbers import check_numbers
from stages.conversion.places import INSPECT, Places, check_tensor, lent_by
from stages.conversion.progress import ProgressReport
from stages.conversion.quantizer import Quantizer
from stages.errors import UserError, exit_with_one_line, without_collection
from stages.planning.outputs import SHARD_METADATA, outputs_of_shard, specs_of
from stages.planning.record import read_plan
from stages.receipts import plan_hash, zeros_note
from stages.schemes.modules import Matrix, Output
from stages.settings import Settings, load, stage_parser
from stages.sources.listing import read_listing

MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # mallopt's parameter and its value in bytes


def keep_memory_steady() -> None:
    """Tells glibc to give large blocks back to the system one by one; other C libraries do so anyway.

    By itself it raises its threshold as large blocks are freed, and then keeps such blocks in its heap, where small ones that
    live longer cut them up: one run in ten grew by several hundred megabytes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _check_header(reader: ShardReader, plan: dict, shard: str) -> None:
    """UserError where the shard is not the one that was inspected."""
    planned = {name: entry for name, entry in plan["tensors"].items() if entry["shard"] == shard}
    if more := sorted(reader.header.tensors.keys() - planned.keys()):
        raise UserError(f"{shard}: tensor {more[0]} was not there when it was inspected; {INSPECT}")
    if lost := sorted(planned.keys() - reader.header.tensors.keys()):
        raise UserError(f"{shard}: tensor {lost[0]} is gone, which was there when it was inspected; {INSPECT}")
    for name, entry in planned.items():
        check_tensor(reader, shard, name, entry)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_digest(settings: Settings, shard: str, digest: str) -> None:
    """UserError where the bytes that were converted are not those that the hub listed; the download is deleted."""
    listed = read_listing(settings).get(shard, {}).get("sha256")
    if listed and digest != listed:
        (settings.shard_directory / shard).unlink()
        raise UserError(f"{settings.shard_directory / shard}: has sha256 {digest[:12]}..., the hub listed {listed[:12]}...; it was changed "
                        f"after it was downloaded and is deleted, run again (or download --shard {shard})")


def _write(plan: dict, outputs: list[Output], reader: ShardReader, quantizer: Quantizer, writer: ShardWriter, progress: ProgressReport) -> None:
    """Streams all tensors of the output file, in its order."""
    pending: dict[Matrix, list] = {}  # scale bytes wait until their codes are written
    for output in outputs:
        if output.part == "weight":
            entry, done, zeros = plan["tensors"][output.source], 0, len(output.shape) > 1
            for chunk in reader.chunks(output.source):
                check_numbers(output.source, entry, chunk, done)
                writer.write(output.name, chunk)
                progress.advance(len(chunk))
                done += len(chunk)
                zeros = zeros and not np.frombuffer(chunk, np.uint8).any()
            if zeros:
                quantizer.zeros.append(output.source)
        elif output.part == "codes":
            for expert in range(output.shape[0]) if len(output.shape) == 3 else [output.matrix.expert]:
                for codes, scale in quantizer.panels(output.source, output.matrix, expert):
                    writer.write(output.name, codes)
                    pending.setdefault(output.matrix, []).append(scale)
        else:
            for scale in pending.pop(output.matrix):
                writer.write(output.name, scale)


def convert_shard(settings: Settings, plan: dict, shard: str) -> dict:
    """Converts one shard and returns its receipt (also written beside the output)."""
    source_path = settings.shard_directory / shard
    if not source_path.exists():
        raise UserError(f"{source_path} is missing: run download --shard {shard} first")
    target = settings.run_directory / "shards" / shard
    receipt_path = target.with_suffix(".json")
    outputs = outputs_of_shard(plan, shard)
    promised = plan["shards"][shard]
    check_disk(target.parent, promised["file_bytes"], f"converted shard {shard}")
    with ExitStack() as stack:
        identity = _identity(source_path)
        stop = threading.Event()
        hashing = stack.enter_context(ThreadPoolExecutor(1, "source-hash"))
        stack.callback(stop.set)  # runs before the executor waits, so a failure shows at once
        source_sha256 = hashing.submit(sha256_file, source_path, stop)  # goes on while kernels are loaded

        reader = stack.enter_context(ShardReader(source_path))
        _check_header(reader, plan, shard)
        progress = ProgressReport(shard, promised["source_bytes"])
        stack.callback(progress.close)
        with without_collection():
            places = Places(settings, plan, shard, reader)
            quantizer = Quantizer(places, plan, shard, settings.device.backend, progress)
        start = time.monotonic()
        kept = {output.name for output in outputs if output.part == "weight"}
        with ShardWriter(target, specs_of(outputs), SHARD_METADATA, kept) as writer:
            _write(plan, outputs, reader, quantizer, writer, progress)
            lent = {name: reader.sha256(name) for name in lent_by(plan, shard)}
            source_digest = source_sha256.result()
            if _identity(source_path) != identity:  # before the output takes its name
                raise UserError(f"{source_path} changed while it was converted; {INSPECT}")
            _check_digest(settings, shard, source_digest)
    assert writer.size == promised["file_bytes"], f"{shard}: {writer.size} bytes, planned {promised['file_bytes']}"
    seconds = time.monotonic() - start
    source_bytes = source_path.stat().st_size
    receipt = {
        "shard": shard,
        "plan_sha256": plan_hash(plan, shard),
        "source": {"bytes": source_bytes, "sha256": source_digest},
        "output": {"bytes": writer.size, "sha256": writer.sha256},
        "tensors": writer.tensor_sha256,
        "borrowed": places.borrowed,
        "lent": lent,
        "quantized": {source: sorted(sums, key=lambda entry: entry[0] or 0)
                      for source, sums in sorted(quantizer.sums.items())},
        "zeros": sorted(quantizer.zeros),
        "seconds": round(seconds, 3),
        "bytes_per_second": round(source_bytes / seconds),
    }
    write_json(receipt_path, receipt)
    done = [entry[1:] for sums in quantizer.sums.values() for entry in sums]
    line = f"{shard}: {human_bytes(source_bytes)} -> {human_bytes(writer.size)}, {human_bytes(source_bytes / seconds)}/s"
    if done:
        signal, error = (math.fsum(t[i] for t in done) for i in (0, 1))
        line += f", SQNR {decibels(signal, error):.2f} dB" if error else ", exact"
    print(line, flush=True)
    if receipt["zeros"]:
        print(f"note: {zeros_note(receipt['zeros'])}", flush=True)
    return receipt


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    parser = stage_parser(__doc__)
    parser.add_argument("--shard", required=True, help="file name of the shard, for example model-00002.safetensors")
    arguments = parser.parse_args()
    settings = load(arguments.overrides)
    plan = read_plan(settings)
    if arguments.shard not in plan["shards"]:
        raise UserError(f"--shard {arguments.shard}: not in plan.json, which has {', '.join(plan['shards'])}")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, if it is: one process per shard is the parallelism
    keep_memory_steady()
    convert_shard(settings, plan, arguments.shard)


if __name__ == "__main__":
    main()
