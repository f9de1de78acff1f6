"""Converts one shard: quantizes what the plan says, passes everything else through byte for byte, writes a receipt.

A shard is streamed in the order of the output file, one expert's matrix (or a panel of rows) at a time, so that resident
memory does not grow with the shard. One thread converts; others hash the source (which also reads it ahead), hash the output
and write it (stages/checkpoint/writer.py). Bytes depend on the source and the recipe only: not on the backend, the number of
workers, or how often the run was interrupted. Converting itself stays in one thread: one process per shard keeps cores busier
than threads inside one.

The receipt is what later stages trust: sha256 of the source and of the output, of every tensor that passed through, and for every
quantized matrix the sums of squares of the signal, of the error and of what it decodes to.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kernels import mxfp4
from kernels.arrays import first_index, to_float32
from kernels.errors import NonFiniteError
from stages.checkpoint.files import check_disk, human_bytes, sha256_file, write_json
from stages.checkpoint.header import TensorInfo
from stages.checkpoint.reader import ShardReader, as_array
from stages.checkpoint.writer import ShardWriter
from stages.dialects import Claim
from stages.dialects.reading import Tensors, stored_rows
from stages.download import read_listing, read_tensor_bytes
from stages.errors import UserError, exit_with_one_line, without_collection
from stages.plan import SHARD_METADATA, outputs_of_shard, read_plan, specs_of
from stages.receipts import plan_hash, zeros_note
from stages.schemes import SCHEMES
from stages.schemes.modules import Matrix, Output
from stages.settings import Settings, load, stage_parser

PANEL_WEIGHTS = 8 << 20  # weights quantized at once; a whole expert of Step-3.7 (1280 x 4096) fits
NO_TILE = (1, 1)  # of weights that come without tile scales
KEPT_BYTES = 64 << 20  # of scales from other shards that are kept in memory
USUAL_SIZES = (1e-9, 1e4)  # root mean square of a network's weights; outside of it a scale was misunderstood
MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # mallopt's parameter and its value in bytes
INSPECT = "run download --metadata and inspect_format again"
REPORT_SECONDS = 10.0  # between progress lines where the output is no terminal


class ProgressReport:
    """Rate and time left: a bar on a terminal, a line every few seconds in a log."""

    def __init__(self, shard: str, total_bytes: int):
        self._shard, self._total, self._done = shard, total_bytes, 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(TextColumn(shard), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                                 TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(shard, total=total_bytes)
            self._bar.start()

    def advance(self, count: int) -> None:
        """Counts source bytes done."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last > REPORT_SECONDS:
            self._last = time.monotonic()
            rate = self._done / (self._last - self._start)
            print(f"{self._shard}: {100 * self._done / self._total:3.0f} %, {human_bytes(rate)}/s, "
                  f"{(self._total - self._done) / rate:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()


def keep_memory_steady() -> None:
    """Tells glibc to give large blocks back to the system one by one; other C libraries do so anyway.

    By itself it raises its threshold as large blocks are freed, and then keeps such blocks in its heap, where small ones that
    live longer cut them up: one run in ten grew by several hundred megabytes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


class Loose:
    """A tensor that came whole into memory, with the methods of ShardReader that dialects use."""

    def __init__(self, array: np.ndarray, info: TensorInfo):
        self._array, self._info = array, info

    def info(self, name: str) -> TensorInfo:
        """Its dtype and shape."""
        return self._info

    def array(self, name: str) -> np.ndarray:
        """All of it."""
        return self._array

    def matrix_array(self, name: str, expert: int | None, begin: int, end: int, buffer: bytearray | None = None) -> np.ndarray:
        """Rows begin..end of one matrix, as ShardReader gives them."""
        rows = (self._array if expert is None else self._array[expert])[begin:end]
        return np.ascontiguousarray(rows.reshape(len(rows), -1))


class Places:
    """Where the tensors lie that a shard's weights need: in the shard itself, or a scale in another one.

    A tensor of another shard is read whole, from the local source or by a range request to the hub at the pinned revision,
    into memory; KEPT_BYTES of them are kept, because panels and experts ask for the same. Where headers.json does not fit what comes,
    the size of the file differs and the hub's answer is refused.
    """

    def __init__(self, settings: Settings, plan: dict, shard: str, reader: ShardReader):
        self._settings, self._plan, self._shard, self._reader = settings, plan, shard, reader
        self._kept: dict[str, Loose] = {}

    def __call__(self, name: str) -> ShardReader | Loose:
        stored = self._plan["tensors"][name]
        if stored["shard"] == self._shard:
            return self._reader
        if name not in self._kept:
            while self._kept and sum(self._plan["tensors"][kept]["bytes"] for kept in self._kept) + stored["bytes"] > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[name] = self._fetched(name, stored)
        return self._kept[name]

    def _fetched(self, name: str, stored: dict) -> Loose:
        info = TensorInfo(stored["dtype"], tuple(stored["shape"]), 0, stored["bytes"])
        if self._settings.source.path:
            with ShardReader(Path(self._settings.source.path) / stored["shard"]) as other:
                _check_tensor(other, stored["shard"], name, stored)
                return Loose(other.array(name), info)
        return Loose(as_array(bytearray(read_tensor_bytes(self._settings, stored["shard"], name)), info.dtype, info.shape), info)


class Quantizer:
    """Quantizes matrices of one shard and keeps their sums for the receipt."""

    def __init__(self, places: Places, plan: dict, shard: str, backend: str, progress: ProgressReport):
        if not mxfp4.available(backend):
            raise UserError(f"device.backend={backend} does not run on this machine; choose one of "
                            f"{', '.join(mxfp4.backends())}")
        try:  # compiles or loads the kernel before the clock starts; Triton compiles others for a single row and for each rule
            SCHEMES["mxfp4"].quantize(np.zeros((128, 256), np.uint8), np.ones((1, 2), np.float32), (128, 128), plan["exponent_rule"], backend)
        except (EOFError, pickle.UnpicklingError):
            from kernels.mxfp4 import cpu

            raise UserError(f"{cpu.cache_directory()}: the compiled kernels that numba keeps there are damaged; delete that directory "
                            "and run again") from None
        self._tensors, self._plan, self._shard = Tensors(places), plan, shard
        self._backend, self._progress = backend, progress
        largest = max((entry["bytes"] // (entry["matrix"][0] if len(entry["matrix"]) == 3 else 1)
                       for entry in plan["tensors"].values() if entry["shard"] == shard and entry["scheme"]), default=0)
        self._buffer = bytearray(min(largest, 4 * PANEL_WEIGHTS))
        self._codes = np.empty(0, np.uint8)  # memory for those of a panel
        self.sums: dict[str, list[list]] = {}  # group -> [number of the expert or None, signal, error, decoded]
        self.zeros: list[str] = []  # weights of which nothing but zeros came

    def panels(self, source: str, matrix: Matrix, expert: int | None):
        """Yields (codes, scale) of consecutive row panels of a matrix; adds its sums to the receipt."""
        rows = range(*matrix.rows)
        entry = self._plan["tensors"][source]
        claim, scheme = Claim.from_entry(entry), SCHEMES[entry["scheme"]]
        height = max(1, PANEL_WEIGHTS // (claim.matrix[-1] * rows.step))
        if claim.tile:
            height = max(claim.tile[0], height // claim.tile[0] * claim.tile[0])
        row_bytes = entry["bytes"] // math.prod(claim.matrix[:-1])
        total = [0.0, 0.0, 0.0]
        for position in range(0, len(rows), height):
            panel = rows[position:position + height]
            try:
                weight, scale = stored_rows(self._tensors, source, claim, expert, panel[0], panel[-1] + 1, self._buffer)
            except NonFiniteError as error:
                raise self._unusable(source, claim, expert, range(panel[0], panel[-1] + 1), error) from None
            try:
                weight, scale = (part if part is None else np.ascontiguousarray(part[::rows.step]) for part in (weight, scale))
                if weight.size > 2 * self._codes.size:
                    self._codes = np.empty(weight.size // 2, np.uint8)
                codes, scales, sums = scheme.quantize(weight, scale, claim.tile or NO_TILE, self._plan["exponent_rule"], self._backend,
                                                      self._codes)
            except NonFiniteError as error:
                raise self._unusable(source, claim, expert, panel, error) from None
            for number, value in enumerate(sums):
                total[number] += value
            self._progress.advance(row_bytes * len(panel))
            yield codes, scales
        size = math.sqrt(total[0] / (len(rows) * claim.matrix[-1]))
        if not size:
            self.zeros.append(source if expert is None else f"{source}[{expert}]")
        elif not USUAL_SIZES[0] < size < USUAL_SIZES[1]:
            raise UserError(f"{entry['shard']}: {source}{'' if expert is None else [expert]} decodes to weights of {size:.1e} (root mean "
                            f"square), which no network has; its scales mean something else than {claim.dialect} takes them for, or are damaged")
        number = expert if matrix.number is None else matrix.number
        self.sums.setdefault(matrix.group, []).append([number, *total])

    def _unusable(self, source: str, claim: Claim, expert: int | None, rows: range, error: NonFiniteError) -> UserError:
        """The line that names the number of the source that no weight can be made of; `rows` are those that `error` counts from."""
        name, index = source, list(error.index)
        if error.what == "tensor scale":
            name = claim.parts["tensor_scale"]
        elif claim.one_scale and error.what != "weight":
            name, index = claim.scale, [0]
        else:
            if error.what != "weight":
                name, index[0] = claim.scale, index[0] + rows[0] // claim.tile[0]
            else:
                index[0] = rows[index[0]]
            index = index if expert is None else [expert, *index]
        return UserError(f"{self._plan['tensors'][name]['shard']}: {name}{index} is {error.value}, no number that a weight can be "
                         "made of; the source is damaged, get that shard again")


def check_kept(name: str, entry: dict, chunk: memoryview, begin: int) -> None:
    """UserError at the first number of an FP8 weight or scale that stays as it is and means none; `chunk` begins at byte `begin`."""
    numbers = as_array(chunk, entry["dtype"], (-1,))
    if entry["dtype"] == "F8_E4M3":
        bad = (numbers & 0x7F) == 0x7F
    elif entry["dtype"] in ("U8", "F8_E8M0"):
        bad = numbers == 255
    else:
        values = to_float32(numbers)
        bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        flat = begin // numbers.itemsize + first_index(bad)[0]
        index = [int(part) for part in np.unravel_index(flat, entry["shape"])]
        raise UserError(f"{entry['shard']}: {name}{index} is no number that a weight can be made of; the source is damaged, get that shard again")


EXPONENTS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}  # all set: NaN or infinite


def check_plain(name: str, entry: dict, chunk: memoryview, begin: int) -> None:
    """UserError at the first NaN or infinity of an unquantized weight that passes through; `chunk` begins at byte `begin`."""
    if entry["dtype"] not in EXPONENTS or not name.endswith("weight"):
        return
    dtype, exponent = EXPONENTS[entry["dtype"]]
    bad = (np.frombuffer(chunk, dtype) & dtype(exponent)) == exponent
    if bad.any():
        flat = begin // np.dtype(dtype).itemsize + first_index(bad)[0]
        index = [int(part) for part in np.unravel_index(flat, entry["shape"])]
        raise UserError(f"{entry['shard']}: {name}{index} is NaN or infinite; the source is damaged, get that shard again")


def _check_header(reader: ShardReader, plan: dict, shard: str) -> None:
    """UserError where the shard is not the one that was inspected."""
    planned = {name: entry for name, entry in plan["tensors"].items() if entry["shard"] == shard}
    if more := sorted(reader.header.tensors.keys() - planned.keys()):
        raise UserError(f"{shard}: tensor {more[0]} was not there when it was inspected; {INSPECT}")
    if lost := sorted(planned.keys() - reader.header.tensors.keys()):
        raise UserError(f"{shard}: tensor {lost[0]} is gone, which was there when it was inspected; {INSPECT}")
    for name, entry in planned.items():
        _check_tensor(reader, shard, name, entry)


def _check_tensor(reader: ShardReader, shard: str, name: str, entry: dict) -> None:
    info = reader.info(name)
    if (info.dtype, list(info.shape)) != (entry["dtype"], entry["shape"]):
        raise UserError(f"{shard}: tensor {name} is {info.dtype} {list(info.shape)}, but was "
                        f"{entry['dtype']} {entry['shape']} when it was inspected; {INSPECT}")


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
                (check_kept if entry["decision"] == "keep" else check_plain)(output.source, entry, chunk, done)
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
            quantizer = Quantizer(Places(settings, plan, shard, reader), plan, shard, settings.device.backend, progress)
        start = time.monotonic()
        kept = {output.name for output in outputs if output.part == "weight"}
        with ShardWriter(target, specs_of(outputs), SHARD_METADATA, kept) as writer:
            _write(plan, outputs, reader, quantizer, writer, progress)
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
        line += f", SQNR {10 * math.log10(signal / error):.2f} dB" if error else ", exact"
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
