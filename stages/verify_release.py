"""Reads the release back from disk and proves it, trusting nothing but plan, receipts and the files that it copied.

Every shard is read once, by as many threads as there are cores: each byte goes into the sha256 of its file, into that of its tensor
where it passed through, and into the sum of squares of its matrix where it is quantized (kernels/energy.py). Each check is a row
of the proof table in the report. A single failure ends the stage with a non-zero exit and the first fault named. What failed is in
verify.failed.json; a report and a card of an earlier, proven release are then removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kernels.decibels import decibels
from kernels.energy import energy
from stages.checkpoint.files import memory, read_json, sha256_file, write_json
from stages.checkpoint.header import INDEX, Header, read_header
from stages.checkpoint.reader import ShardReader
from stages.errors import UserError, exit_with_one_line
from stages.planning.modules import coverage
from stages.planning.outputs import index_json, release_config, release_outputs
from stages.planning.record import read_plan
from stages.receipts import read_receipts
from stages.release import REPORTS, auxiliary_files, bundled_files, manifest_of, other_files
from stages.schemes import draft_scales
from stages.schemes.modules import Output
from stages.serving.plugin import PLUGIN
from stages.settings import Settings, load, stage_parser
from stages.sources.listing import check_source, read_config, read_listing

RELATIVE_TOLERANCE = 1e-9  # of sums of squares that two implementations add up in different orders
PANEL_BYTES = 1 << 20  # of codes read at once: they stay in the cache until they were hashed and summed


@dataclass
class Reading:
    """What one pass over a shard of the release found."""

    sha256: str = ""
    passed: dict[str, set[str]] = field(default_factory=dict)  # tensor that passed through -> sha256 of its bytes here and in a local source
    energies: dict[tuple[str, int | None], float] = field(default_factory=dict)  # codes, matrix of a 3D tensor -> sum of w_hat^2


class Stopped(Exception):
    """The proof was interrupted; nobody asks for this reading any more."""


def read_shard(path: Path, planned: dict[str, Output], schemes: dict[str, str], source: Path | None, stop: threading.Event) -> Reading:
    """Reads a shard of the release once; planned: its tensors by name; schemes: those of the source's weights. Raises Stopped once `stop` is set.

    A tensor that is not as planned is hashed with the file and left to the inventory. UserError where the file is no sound shard.
    """
    reading, whole = Reading(), hashlib.sha256()
    scales = {output.matrix: output for output in planned.values() if output.part == "scale"}
    with ShardReader(path) as reader:
        found = reader.header.tensors

        def fits(output: Output | None) -> bool:
            info = output and found.get(output.name)
            return info is not None and (info.dtype, tuple(info.shape)) == (output.dtype, output.shape)

        whole.update(reader.head())
        for name, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
            if stop.is_set():
                raise Stopped
            output = planned.get(name)
            if fits(output) and output.part == "codes" and fits(scales.get(output.matrix)):
                for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                    reading.energies[name, expert] = _energy(reader, output, scales[output.matrix], expert, schemes[output.source], whole)
                continue
            digest = hashlib.sha256() if output and output.part == "weight" else None
            for chunk in reader.chunks(name):
                whole.update(chunk)
                if digest:
                    digest.update(chunk)
            if digest:
                reading.passed[name] = {digest.hexdigest()}
    reading.sha256 = whole.hexdigest()
    if source is not None and source.exists():
        with ShardReader(source) as reader:
            for name, digests in reading.passed.items():
                if stop.is_set():
                    raise Stopped
                digests.add(reader.sha256(planned[name].source))
    return reading


def _energy(reader: ShardReader, codes: Output, scale: Output, expert: int | None, scheme: str, whole) -> float:
    """Sum of squares of what one matrix decodes to; its codes also go into the digest `whole`."""
    rows, width = codes.shape[-2:]
    total, step = 0.0, max(1, PANEL_BYTES // max(1, width))
    buffer = memory(min(step, rows) * width)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        panel = reader.matrix_array(codes.name, expert, begin, end, buffer)
        whole.update(panel)
        total += energy(panel, reader.matrix_array(scale.name, expert, begin, end), scheme)
    return total


def _where(right: object, found: object, key: str) -> str:
    """Path of the first value in which two JSON values differ."""
    if isinstance(right, dict) and isinstance(found, dict):
        differing = next(name for name in sorted(right.keys() | found.keys()) if right.get(name) != found.get(name))
        return _where(right.get(differing), found.get(differing), f"{key}: {differing}")
    return key


def threads() -> int:
    """How many to read with: what Snakemake gave to the job, or the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


class Verification:
    """One run of all checks over results/<source>/<recipe>/release."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.release = settings.run_directory / "release"
        self.plan = read_plan(settings)
        self.receipts = read_receipts(settings, self.plan)
        self.planned = {output.name: (shard, output) for shard, outputs in release_outputs(self.plan).items() for output in outputs}
        self.planned |= {name: (draft_scales.SHARD, Output(name, "F32", (1,), name, "constant"))
                         for name in self.plan["draft_scales"]}
        self.planned_in: dict[str, dict[str, Output]] = {}
        for name, (shard, output) in self.planned.items():
            self.planned_in.setdefault(shard, {})[name] = output
        self.schemes = {name: entry["scheme"] for name, entry in self.plan["tensors"].items() if entry["scheme"]}
        self.shards = [*self.plan["shards"], *([draft_scales.SHARD] if self.plan["draft_scales"] else [])]
        self.headers: dict[str, Header] = {}
        self.readings: dict[str, Future] = {}
        self.checked: dict[str, int] = {}

    def files(self) -> Iterator[str]:
        """The manifest is what plan and receipts make of it; every file is there, with its size and sha256, and no other."""
        manifest = read_json(self.release / "manifest.json", "assemble_release")
        present = {p.relative_to(self.release).as_posix() for p in self.release.rglob("*") if p.is_file()}
        expected = {*self.shards, *other_files(self.settings, self.plan), "manifest.json"}
        yield from (f"{name}: is missing" for name in sorted(expected - present))
        yield from (f"{name}: does not belong to the release" for name in sorted(present - expected))
        yield from (f"manifest.json: lists {name}, which does not belong to the release" for name in sorted({*manifest["files"]} - expected))
        for name, entry in manifest["files"].items():
            if name in present and ((self.release / name).stat().st_size != entry["bytes"] or self._sha256(name) != entry["sha256"]):
                yield f"{name}: its bytes are not those of the manifest"
        right = manifest_of(self.settings, self.plan, self.receipts, {k: v for k, v in manifest["files"].items() if k in expected})
        for key in sorted(right.keys() | manifest.keys()):
            if right.get(key) != manifest.get(key):
                yield f"manifest.json: {_where(right.get(key), manifest.get(key), key)} is not what plan and receipts say"
        self.checked["files"] = len(expected)

    def _sha256(self, name: str) -> str:
        if name in self.readings and not self.readings[name].exception():
            return self.readings[name].result().sha256
        return sha256_file(self.release / name)

    def inventory(self) -> Iterator[str]:
        """Every planned tensor is in its shard once, with its dtype and shape, and there is none besides."""
        seen = {}
        for shard in self.shards:
            self.headers[shard] = read_header(self.release / shard)
            for name, info in self.headers[shard].tensors.items():
                if name in seen:
                    yield f"{name}: is in {seen[name]} and in {shard}"
                seen[name] = shard
                if name not in self.planned:
                    yield f"{shard}: {name} was not planned"
                    continue
                planned_shard, output = self.planned[name]
                if (shard, info.dtype, tuple(info.shape)) != (planned_shard, output.dtype, output.shape):
                    yield (f"{shard}: {name} is {info.dtype} {list(info.shape)}, planned {output.dtype} "
                           f"{list(output.shape)} in {planned_shard}")
        yield from (f"{name}: is in no shard" for name in self.planned if name not in seen)
        if self.plan["draft_scales"]:
            with ShardReader(self.release / draft_scales.SHARD) as reader:
                yield from (f"{name}: is not the inert {value}" for name, value in self.plan["draft_scales"].items()
                            if seen.get(name) == draft_scales.SHARD and reader.array(name).item() != value)
        self.checked["tensors"] = len(self.planned)

    def index(self) -> Iterator[str]:
        """The index names every tensor with its shard, and total_size is the true number of tensor bytes."""
        weight_map = {name: shard for name, (shard, _) in self.planned.items()}
        total = self._tensor_bytes()
        if (self.release / INDEX).read_text(encoding="utf-8") != index_json(weight_map, total):
            yield f"{INDEX}: does not list exactly the tensors of the shards with total_size {total}"

    def passthrough(self) -> Iterator[str]:
        """Every tensor that is not quantized has, re-read from disk, the sha256 of its source bytes: those hashed when
        the shard was converted and, where the source is a local directory, those that it holds now."""
        count = 0
        for shard in self.plan["shards"]:
            passed = self.readings[shard].result().passed
            for name, output in self.planned_in.get(shard, {}).items():
                if output.part == "weight":
                    if passed.get(name, set()) != {self.receipts[shard]["tensors"][name]}:
                        yield f"{shard}: {name} is not bit-identical to the source"
                    count += 1
        self.checked["passthrough"] = count

    def auxiliary(self) -> Iterator[str]:
        """Tokenizer and other auxiliary files are those of the source, byte for byte, and the plugin is this project's."""
        listing = read_listing(self.settings)
        originals = {name: listing[str(name)]["sha256"] for name in auxiliary_files(self.settings)}
        originals |= {Path(PLUGIN.name) / path: sha256_file(PLUGIN / path) for path in bundled_files(self.plan)}
        for name, original in originals.items():
            if sha256_file(self.release / name) != original:
                yield f"{name}: differs from its original"
        self.checked["auxiliary"] = len(originals)

    def quantized(self) -> Iterator[str]:
        """Every quantized tensor, as it lies on the disk, has the energy that was measured, and its SQNR
        is above the floor: swapped names, swapped shards and scales off by one all change the energy."""
        floor = self.settings.release.minimum_sqnr_db
        missing = {(output.matrix.group, number): (name, number if len(output.shape) == 3 else None)
                   for name, (_, output) in self.planned.items() if output.part == "codes"
                   for number in (range(output.shape[0]) if len(output.shape) == 3 else [output.matrix.expert])}
        count = 0
        for shard in self.plan["shards"]:
            energies = self.readings[shard].result().energies
            for group, sums in self.receipts[shard]["quantized"].items():
                for number, signal, error, decoded in sums:
                    place = missing.pop((group, number), None)
                    if place is None:
                        yield f"{shard}: its receipt measures {group} number {number}, which was not planned or was measured before"
                        continue
                    codes, found = place[0], energies[place]
                    if not math.isclose(found, decoded, rel_tol=RELATIVE_TOLERANCE):
                        yield (f"{shard}: {codes} decodes to a sum of squares of {found!r}, measured were {decoded!r} "
                               "when it was quantized")
                    if decibels(signal, error) < floor:
                        yield (f"{shard}: {codes} has {decibels(signal, error):.2f} dB SQNR, below the floor of "
                               f"{floor} dB (release.minimum_sqnr_db)")
                    count += 1
        yield from (f"{name}: matrix {number} of {group} was not measured when it was quantized" for (group, number), (name, _) in missing.items())
        self.checked["quantized"] = count

    def config(self) -> Iterator[str]:
        """config.json is the source's but for quantization_config, and vLLM's matching claims every module correctly."""
        found = read_json(self.release / "config.json", "assemble_release")
        section = self.plan["quantization_config"]
        if json.dumps(found) != json.dumps(release_config(read_config(self.settings), section)):
            yield "config.json: differs from the source's in more than quantization_config"
        modules, faults = coverage(self.plan, found.get("quantization_config") or section)
        yield from faults
        self.checked["config"] = modules

    def sizes(self) -> Iterator[str]:
        """Bytes of tensors, shard files, index and config are exactly what the plan predicted."""
        actual = {
            "release_tensor_bytes": self._tensor_bytes(),
            "release_shard_file_bytes": sum((self.release / s).stat().st_size for s in self.shards),
            "release_index_bytes": (self.release / INDEX).stat().st_size,
            "release_config_bytes": (self.release / "config.json").stat().st_size,
        }
        for key, value in actual.items():
            if value != self.plan[key]:
                yield f"{key}: {value} on disk, {self.plan[key]} predicted"
        self.checked["sizes"] = len(actual)

    def _size(self, shard: str) -> int:
        return (self.release / shard).stat().st_size if (self.release / shard).exists() else 0

    def _tensor_bytes(self) -> int:
        return sum(info.nbytes for header in self.headers.values() for info in header.tensors.values())

    CHECKS: tuple[tuple[str, str, Callable], ...] = (
        ("files", "Files have the hashes of manifest and receipts, none is missing, none extra", files),
        ("tensors", "Every planned tensor is there once, none extra, dtypes and shapes as planned", inventory),
        ("index", "The index names every tensor and its true total size", index),
        ("passthrough", "Everything not quantized is bit-identical to the source", passthrough),
        ("auxiliary", "Tokenizer, auxiliary files and the plugin are their originals, byte for byte", auxiliary),
        ("quantized", "Every quantized matrix decodes to what was measured", quantized),
        ("config", "vLLM's matching gives every module its stored format", config),
        ("sizes", "Bytes on disk are exactly the predicted ones", sizes),
    )

    def run(self) -> dict:
        """The content of verify.json."""
        pool, stop = ThreadPoolExecutor(threads()), threading.Event()
        try:
            for shard in sorted(self.shards, key=self._size, reverse=True):  # the largest first, so that none is left over at the end
                local = Path(self.settings.source.path) / shard if self.settings.source.path else None
                self.readings[shard] = pool.submit(read_shard, self.release / shard, self.planned_in.get(shard, {}), self.schemes, local, stop)
            return self._checked()
        finally:  # at an interruption, too, which must not wait for the rest of the release
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _checked(self) -> dict:
        rows = []
        for key, title, check in self.CHECKS:
            faults = []
            try:
                for fault in check(self):
                    faults.append(fault)
            except (UserError, OSError) as error:
                faults.append(str(error))
            except (KeyError, TypeError, ValueError) as error:  # of a receipt or manifest that somebody edited
                faults.append(f"could not be checked: {error if isinstance(error, KeyError) else 'a number or a list'} cannot be read")
            rows.append({"check": key, "title": title, "passed": not faults, "count": self.checked.get(key),
                         "faults": faults[:20]})
        manifest = self.release / "manifest.json"
        return {"passed": all(row["passed"] for row in rows), "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
                "minimum_sqnr_db": self.settings.release.minimum_sqnr_db, "checks": rows}


def run(settings: Settings) -> dict:
    """Verifies the release; writes verify.json; UserError when a check fails."""
    verification = Verification(settings)
    check_source(settings, may_be_gone=True)  # else the release would be blamed for what happened to the source
    result = verification.run()
    for row in result["checks"]:
        count = "" if row["count"] is None else f" ({row['count']})"
        print(f"{'pass' if row['passed'] else 'FAIL'}  {row['title']}{count}")
    write_json(settings.run_directory / ("verify.json" if result["passed"] else "verify.failed.json"), result)
    if not result["passed"]:
        for name in ("verify.json", *REPORTS):  # of an earlier release, which they call proven
            (settings.run_directory / name).unlink(missing_ok=True)
        faults = [fault for row in result["checks"] for fault in row["faults"]]
        raise UserError(f"{settings.run_directory / 'release'}: {faults[0]}"
                        + (f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else "")
                        + "; do not publish it; verify.failed.json has all faults, and a damaged shard is made again once it and its receipt are removed")
    (settings.run_directory / "verify.failed.json").unlink(missing_ok=True)
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
