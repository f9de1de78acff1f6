"""Converts one shard: quantizes what the plan says, passes everything else through byte for byte, writes a receipt.

A shard is streamed in the order of the output file, one expert's matrix (or a panel of rows) at a time, so that resident
memory does not grow with the shard, but for MXFP8's scales, a byte per 32 weights, which the file has behind all codes. One thread
converts; others hash source and output (which also reads the source ahead) and write it (stages/checkpoint/writer.py). Bytes depend on
the source and the recipe only: not on the backend, the number of workers, or how often the run was interrupted. Converting itself stays
in one thread: one process per shard keeps cores busier than threads inside one.

The receipt is what later stages trust: sha256 of the source and of the output, of every tensor that passed through, of scales that one shard
lends to another, and for every quantized matrix the sums of squares of the signal, of the error and of what it decodes to.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from contextlib import ExitStack

import numpy as np

from kernels.decibels import decibels
from stages.checkpoint.files import check_disk, human_bytes, write_rows
from stages.checkpoint.hashing import HashingThread, hashing_threads
from stages.checkpoint.reader import ShardReader
from stages.checkpoint.writer import ShardWriter
from stages.conversion.numbers import check_numbers
from stages.conversion.places import INSPECT, Places, check_tensor, lent_by
from stages.conversion.progress import ProgressReport
from stages.conversion.quantizer import Quantizer
from stages.errors import UserError, exit_with_one_line, without_collection
from stages.planning.outputs import SHARD_METADATA, release_outputs, specs_of
from stages.planning.record import read_plan
from stages.receipts import plan_hashes, zeros_note
from stages.records import Plan, Receipt
from stages.schemes.modules import Matrix, Output
from stages.settings import Settings, load, stage_parser
from stages.sources.listing import read_listing
from stages.sources.local import check_file

MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # mallopt's parameter and its value in bytes


def keep_memory_steady() -> None:
    """Tells glibc to give large blocks back to the system one by one; other C libraries do so anyway.

    By itself it raises its threshold as large blocks are freed, and then keeps such blocks in its heap, where small ones that
    live longer cut them up: one run in ten grew by several hundred megabytes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _check_header(reader: ShardReader, plan: Plan, shard: str) -> None:
    """UserError where the shard is not the one that was inspected."""
    planned = {name: entry for name, entry in plan["tensors"].items() if entry["shard"] == shard}
    if more := sorted(reader.header.tensors.keys() - planned.keys()):
        raise UserError(f"{shard}: tensor {more[0]} was not there when it was inspected; {INSPECT}")
    if lost := sorted(planned.keys() - reader.header.tensors.keys()):
        raise UserError(f"{shard}: tensor {lost[0]} is gone, which was there when it was inspected; {INSPECT}")
    for name, entry in planned.items():
        check_tensor(reader, shard, name, entry)


class Original:
    """The source's shard while it is converted: hashed meanwhile, and refused if it changes."""

    def __init__(self, settings: Settings, shard: str, hashing: HashingThread):
        self._of_hub, self._shard = bool(settings.source.repository), shard  # what is not of a hub is the user's own
        self.path = settings.shard_directory / shard
        self._listed = read_listing(settings).get(shard, {})
        if settings.source.path:
            check_file(settings.source, shard, self._listed)
        elif not self.path.exists():
            raise UserError(f"{self.path} is missing: run download --shard {shard} first")
        self._before = self._identity()
        self._sha256 = hashing.file(self.path)  # goes on while kernels are loaded

    def _identity(self) -> tuple[int, ...]:
        """What changes when a file is replaced or written to."""
        status = self.path.stat()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def sha256(self) -> str:
        """Its hash; UserError where the file is not the one that conversion began with, or not the one that the hub listed, which is deleted."""
        digest = self._sha256.result()
        if self._identity() != self._before:
            raise UserError(f"{self.path} changed while it was converted; {INSPECT}")
        listed = self._listed.get("sha256")
        if self._of_hub and listed and digest != listed:
            self.path.unlink()
            raise UserError(f"{self.path}: has sha256 {digest[:12]}..., the hub listed {listed[:12]}...; it was changed after it was downloaded and "
                            f"is deleted, run again (or download --shard {self._shard})")
        return digest


def _pass_through(plan: Plan, output: Output, reader: ShardReader, writer: ShardWriter, progress: ProgressReport) -> bool:
    """Copies a tensor byte for byte, in chunks; whether it is a matrix of nothing but zeros."""
    entry, done, zeros = plan["tensors"][output.source], 0, len(output.shape) > 1
    for chunk in reader.chunks(output.source):
        check_numbers(output.source, entry, chunk, done)
        writer.write(output.name, chunk)
        progress.advance(len(chunk))
        done += len(chunk)
        zeros = zeros and not np.frombuffer(chunk, np.uint8).any()
    return zeros


def _write(plan: Plan, outputs: list[Output], reader: ShardReader, quantizer: Quantizer, writer: ShardWriter, progress: ProgressReport) -> list[str]:
    """Streams all tensors of the output file, in its order; names those that hold nothing but zeros."""
    pending: dict[Matrix, list] = {}  # scale bytes wait until their codes are written
    empty = []
    for output in outputs:
        if output.part == "weight":
            if _pass_through(plan, output, reader, writer, progress):
                empty.append(output.source)
        elif output.part == "codes":
            for expert in range(output.shape[0]) if len(output.shape) == 3 else [output.matrix.index]:
                for codes, scale in quantizer.panels(output.source, output.matrix, expert):
                    writer.write(output.name, codes)
                    pending.setdefault(output.matrix, []).append(scale)
        else:
            for scale in pending.pop(output.matrix):
                writer.write(output.name, scale)
    return empty + quantizer.zeros


def convert_shard(settings: Settings, plan: Plan, shard: str) -> Receipt:
    """Converts one shard and returns its receipt (also written beside the output)."""
    target = settings.run_directory / "shards" / shard
    outputs, promised = release_outputs(plan, [shard])[shard], plan["shards"][shard]
    check_disk(target.parent, promised["file_bytes"], f"converted shard {shard}")
    with ExitStack() as stack:
        with without_collection():
            of_source, of_output = hashing_threads(stack)
        original = Original(settings, shard, of_source)
        reader = stack.enter_context(ShardReader(original.path))
        _check_header(reader, plan, shard)
        progress = ProgressReport(shard, promised["source_bytes"])
        stack.callback(progress.close)
        places = Places(settings, plan, shard, reader)
        with without_collection():
            quantizer = Quantizer(places, plan, shard, settings.device.backend, progress)
        start = time.monotonic()
        kept = {output.name for output in outputs if output.part == "weight"}
        with ShardWriter(target, specs_of(outputs), SHARD_METADATA, kept, of_output) as writer:
            zeros = _write(plan, outputs, reader, quantizer, writer, progress)
            lent = {name: reader.sha256(name) for name in lent_by(plan, shard)}
            digest = original.sha256()  # before the output takes its name
    assert writer.size == promised["file_bytes"], f"{shard}: {writer.size} bytes, planned {promised['file_bytes']}"
    seconds, status = time.monotonic() - start, original.path.stat()
    size = status.st_size
    receipt: Receipt = {
        "shard": shard,
        "plan_sha256": plan_hashes(plan, [shard])[shard],
        "source": {"bytes": size, "sha256": digest} | ({"mtime_ns": status.st_mtime_ns} if settings.source.path else {}),
        "output": {"bytes": writer.size, "sha256": writer.sha256},
        "tensors": writer.tensor_sha256,
        "borrowed": places.borrowed,
        "lent": lent,
        "quantized": {source: sorted(sums, key=lambda entry: entry.expert or 0) for source, sums in sorted(quantizer.sums.items())},
        "zeros": sorted(zeros),
        "seconds": round(seconds, 3),
        "bytes_per_second": round(size / seconds),
    }
    write_rows(target.with_suffix(".json"), receipt)
    _say(receipt)
    return receipt


def _say(receipt: Receipt) -> None:
    """A shard's result in a line, and what to look into."""
    line = (f"{receipt['shard']}: {human_bytes(receipt['source']['bytes'])} -> {human_bytes(receipt['output']['bytes'])}, "
            f"{human_bytes(receipt['bytes_per_second'])}/s")
    if done := [entry for sums in receipt["quantized"].values() for entry in sums]:
        signal, error = math.fsum(entry.signal for entry in done), math.fsum(entry.error for entry in done)
        line += f", SQNR {decibels(signal, error):.2f} dB" if error else ", exact"
    print(line, flush=True)
    if receipt["zeros"]:
        print(f"note: {zeros_note(receipt['zeros'])}", flush=True)


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
