"""Converts one shard: quantizes what the plan says, passes everything else through byte for byte, writes a receipt.

A shard is streamed in the order of the output file, one expert's matrix (or a panel of rows) at a time, so that resident
memory does not grow with the shard. One thread converts; others hash the source (which also reads it ahead), hash the output
and write it (stages/checkpoint/writer.py). Bytes depend on the source and the recipe only: not on the backend, the number of
workers, or how often the run was interrupted. Converting itself stays in one thread: one process per shard keeps cores busier
than threads inside one.

The receipt is what later stages trust: sha256 of the source and of the output, of every tensor in it, and for every
quantized matrix the sums of squares of the signal, of the error and of what it decodes to.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from stages.checkpoint.files import human_bytes, sha256_file, write_json
from stages.checkpoint.reader import TORCH_DTYPES, ShardReader
from stages.checkpoint.writer import ShardWriter
from stages.dialects import tile_scales
from stages.download import check_disk, read_tensor_bytes
from stages.errors import UserError, exit_with_one_line
from stages.plan import SHARD_METADATA, outputs_of_shard, read_plan, specs_of
from stages.settings import Settings, load, stage_parser

PANEL_WEIGHTS = 8 << 20  # weights quantized at once; a whole expert of Step-3.7 (1280 x 4096) fits
MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # mallopt's parameter and its value in bytes
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


def plan_hash(plan: dict, shard: str) -> str:
    """sha256 over everything in the plan that determines this shard's bytes, scales in other shards among it."""
    entries = {name: entry for name, entry in plan["tensors"].items() if entry["shard"] == shard}
    entries |= {entry["scale"]: plan["tensors"][entry["scale"]] for entry in entries.values() if entry["scheme"] and entry["scale"]}
    part = {"layout": plan["layout"], "exponent_rule": plan["exponent_rule"], "tensors": entries}
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


class TileScales:
    """Tile scales of a shard's weights, from the shard itself or from the one that holds them.

    A scale in another shard is read whole, from the local source or by a range request to the hub at the pinned revision, into
    memory; one is kept, because the panels of a weight ask for the same. Where headers.json does not fit what comes, the size
    of the file differs and the hub's answer is refused.
    """

    def __init__(self, settings: Settings, plan: dict, shard: str, reader: ShardReader):
        self._settings, self._plan, self._shard, self._reader = settings, plan, shard, reader
        self._kept: tuple[str, object] = ("", None)

    def rows(self, entry: dict, expert: int | None, begin: int, end: int):
        """Float scales [tile rows, tile columns] of rows begin..end of a matrix; begin lies on a tile's edge."""
        name, tile = entry["scale"], tuple(entry["tile"])
        first, last, shape = begin // tile[0], -(-end // tile[0]), (end - begin, entry["shape"][-1])
        stored = self._plan["tensors"][name]
        whole_tensor = math.prod(stored["shape"]) == 1
        if stored["shard"] == self._shard and not whole_tensor:
            return tile_scales(self._reader.matrix_rows(name, expert, first, last), shape, tile)
        if self._kept[0] != name:
            self._kept = (name, self._whole(name, stored))
        scale = self._kept[1]
        scale = scale.reshape(1, 1) if whole_tensor else (scale if expert is None else scale[expert])[first:last]
        return tile_scales(scale, shape, tile)

    def _whole(self, name: str, stored: dict):
        import torch

        if stored["shard"] == self._shard:
            return self._reader.tensor(name)
        if self._settings.source.path:
            with ShardReader(Path(self._settings.source.path) / stored["shard"]) as other:
                return other.tensor(name)
        raw = bytearray(read_tensor_bytes(self._settings, stored["shard"], name))
        return torch.frombuffer(raw, dtype=torch.uint8).view(TORCH_DTYPES[stored["dtype"]]).view(stored["shape"])


class Quantizer:
    """Quantizes matrices of one shard and keeps their sums for the receipt."""

    def __init__(self, reader: ShardReader, scales: TileScales, plan: dict, shard: str, backend: str, progress: ProgressReport):
        import torch

        from kernels import mxfp4

        if backend not in mxfp4.backends():
            raise UserError(f"device.backend={backend} does not run on this machine; choose one of "
                            f"{', '.join(mxfp4.backends())}")
        # compiles or loads the kernel before the clock starts
        mxfp4.quantize(torch.zeros(1, 32).to(torch.float8_e4m3fn), torch.ones(1, 1), backend=backend)
        self._device = "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"
        self._mxfp4, self._reader, self._plan, self._shard = mxfp4, reader, plan, shard
        self._backend, self._progress, self._scales = backend, progress, scales
        largest = max((math.prod(entry["shape"][-2:]) * entry["bytes"] // math.prod(entry["shape"])
                       for entry in plan["tensors"].values() if entry["shard"] == shard and entry["scheme"]), default=0)
        self._buffer = bytearray(min(largest, 4 * PANEL_WEIGHTS))
        self.sums: dict[str, list[list]] = {}  # source tensor -> [expert or None, signal, error, decoded]

    def panels(self, source: str, expert: int | None):
        """Yields (packed, scale) of consecutive row panels of a matrix; adds its sums to the receipt."""
        entry = self._plan["tensors"][source]
        rows, columns = entry["shape"][-2:]
        step = max(1, PANEL_WEIGHTS // columns)
        if entry["tile"]:
            step = max(entry["tile"][0], step // entry["tile"][0] * entry["tile"][0])
        total = [0.0, 0.0, 0.0]
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            weight = self._reader.matrix_rows(source, expert, begin, end, self._buffer)
            try:
                scale = self._scales.rows(entry, expert, begin, end) if entry["scale"] else None
                made = self._mxfp4.quantize(
                    weight.to(self._device), scale if scale is None else scale.to(self._device), rule=self._plan["exponent_rule"],
                    tile=tuple(entry["tile"] or (128, 128)), backend=self._backend)
            except self._mxfp4.NonFiniteError as error:
                index = list(error.index)
                name = source
                if error.what != "weight":
                    name, index[0] = entry["scale"], index[0] + begin // entry["tile"][0]
                else:
                    index[0] += begin
                if expert is not None:
                    index.insert(0, expert)
                raise UserError(f"{self._plan['tensors'][name]['shard']}: {name}{index} is {error.value}, no number that a weight can be made of; the "
                                "source is damaged, get that shard again") from None
            for position, value in enumerate((made.signal, made.error, made.decoded)):
                total[position] += float(value)
            self._progress.advance(weight.nbytes)
            yield made.packed.cpu(), made.scale.cpu()
        self.sums.setdefault(source, []).append([expert, *total])


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
        reader = stack.enter_context(ShardReader(source_path))
        stop = threading.Event()
        hashing = stack.enter_context(ThreadPoolExecutor(1, "source-hash"))
        stack.callback(stop.set)  # runs before the executor waits, so a failure shows at once
        for name, entry in plan["tensors"].items():
            if entry["shard"] == shard:
                info = reader.info(name)
                if (info.dtype, list(info.shape)) != (entry["dtype"], entry["shape"]):
                    raise UserError(f"{shard}: tensor {name} is {info.dtype} {list(info.shape)}, but was "
                                    f"{entry['dtype']} {entry['shape']} when it was inspected; run inspect_format again")
        progress = ProgressReport(shard, promised["source_bytes"])
        stack.callback(progress.close)
        quantizer = Quantizer(reader, TileScales(settings, plan, shard, reader), plan, shard, settings.device.backend, progress)
        start = time.monotonic()
        source_sha256 = hashing.submit(sha256_file, source_path, stop)
        pending: dict[str, list] = {}  # scale bytes wait until their packed twin is written
        with ShardWriter(target, specs_of(outputs), SHARD_METADATA) as writer:
            for output in outputs:
                if output.part == "weight":
                    for chunk in reader.chunks(output.source):
                        writer.write(output.name, chunk)
                        progress.advance(len(chunk))
                elif output.part == "packed":
                    scales = pending.setdefault(output.name.replace("weight_packed", "weight_scale"), [])
                    shape = plan["tensors"][output.source]["shape"]
                    stacked = len(shape) == 3 and output.expert is None
                    for expert in range(shape[0]) if stacked else [output.expert]:
                        for packed, scale in quantizer.panels(output.source, expert):
                            writer.write(output.name, packed.numpy())
                            scales.append(scale)
                else:
                    for scale in pending.pop(output.name):
                        writer.write(output.name, scale.numpy())
        source_digest = source_sha256.result()
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
    import torch

    torch.set_num_threads(1)  # one process per shard is the parallelism
    keep_memory_steady()
    convert_shard(settings, plan, arguments.shard)


if __name__ == "__main__":
    main()
