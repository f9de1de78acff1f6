"""Checks a compressed-tensors MXFP4 or MXFP8 checkpoint, ours or not, by its directory alone, and says what is wrong with it.

What an engine would take silently is what is looked for: tensors that no target claims, targets that hit nothing, an
expert that is missing, a scale of another shape, an index that lies. Numbers are looked at, too: block scales that mean NaN,
blocks that leave their range unused, matrices whose size stands apart from that of their siblings. A shift of all exponents by
one cannot be seen in the codes; with a source to compare with, it is. The files that a manifest.json lists are compared with it.

    mxforge verify DIRECTORY [--source DIRECTORY] [--quick] [--json]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from stages.checkup import against_source, completeness, engine, manifest, structure, values
from stages.checkup.checkpoint import Checkpoint
from stages.checkup.source import open_source
from stages.errors import UserError


class Check(NamedTuple):
    """One check: a function that is given the checkpoint, and the source if it asks for it, and yields faults, one line each."""

    key: str
    title: str
    faults: Callable[..., Iterator[str]]
    asks_for_source: bool = False


CHECKS = (
    Check("containers", "Shards are sound, no tensor is in two", structure.containers),
    Check("index", "The index names every tensor, its shard and the true size", structure.index),
    Check("pairs", "Packed weights and scales fit each other, no name is odd", structure.pairs),
    Check("experts", "Every layer has all its routed experts in one format", completeness.experts),
    Check("layers", "Every layer is there, with what its kind has", completeness.layers),
    Check("scheme_arguments", "The config's groups say what is stored", engine.scheme_arguments),
    Check("coverage", "vLLM's matching gives every module its stored format", engine.coverage),
    Check("numbers", "Scales are numbers, blocks use their range", values.numbers, asks_for_source=True),
    Check("manifest", "Files are those of manifest.json", manifest.manifest),
    Check("against_source", "Weights are close to the source's, all other tensors equal to it", against_source.compare, asks_for_source=True),
)


def check(directory: Path, source: Path | None = None, quick: bool = False) -> dict:
    """{"passed", "checks": [...], "notes": [...]}, where a check's "passed" is None if there was nothing to check; UserError for a
    config.json or a source that leaves nothing to check at all."""
    rows = []
    with Checkpoint(directory, quick) as checkpoint, open_source(source, checkpoint.directory) as opened:
        for key, title, function, asks_for_source in CHECKS:
            faults = _gathered(function(checkpoint, opened) if asks_for_source else function(checkpoint))
            title += " (names and sizes, no hashes)" if key == "manifest" and quick else ""
            rows.append({"check": key, "title": title, "passed": not faults if faults or key in checkpoint.counts else None,
                         "count": checkpoint.counts.get(key), "faults": faults})
    return {"directory": str(checkpoint.directory), "passed": not any(row["faults"] for row in rows), "checks": rows, "notes": checkpoint.notes}


def _gathered(faults: Iterator[str]) -> list[str]:
    """All faults of a check, and as the last what ended it early."""
    result = []
    try:
        for fault in faults:
            result.append(fault)
    except (UserError, OSError) as error:
        result.append(str(error))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a stranger's file of a form that nobody foresaw is a fault of the file, and must not hide the other checks
        result.append(f"could not be checked, something has a form that it cannot have ({type(error).__name__}: {str(error)[:120]})")
    return result


def print_result(result: dict) -> None:
    """One page."""
    for row in result["checks"]:
        skipped = row["passed"] is None
        count = "" if row["count"] is None else f" ({row['count']})"
        print(f"{'-   ' if skipped else 'pass' if row['passed'] else 'FAIL'}  {row['title']}{count}" + ("; nothing to check" if skipped else ""))
        for fault in row["faults"][:8]:
            print(f"        {fault}")
        if len(row["faults"]) > 8:
            print(f"        ... and {len(row['faults']) - 8} more")
    for note in result["notes"][:12]:
        print(f"note  {note}")
    if len(result["notes"]) > 12:
        print(f"note  ... and {len(result['notes']) - 12} more")
    if result["passed"]:
        skipped = sum(row["passed"] is None for row in result["checks"])
        print(f"sound: {len(result['checks']) - skipped} checks" + (f", {skipped} had nothing to check" if skipped else ""))


def run(directory: Path, source: Path | None, quick: bool, as_json: bool) -> None:
    """Prints the page, or the result as JSON; UserError when a check failed."""
    for place in filter(None, (directory, source)):
        if not place.is_dir():
            raise UserError(f"{place}: no such directory; name a checkpoint directory")
    result = check(directory, source, quick)
    print(json.dumps(result, indent=2)) if as_json else print_result(result)
    if not result["passed"]:
        count = sum(len(row["faults"]) for row in result["checks"])
        raise UserError(f"{directory}: {count} fault{'s' if count > 1 else ''}; do not serve or publish it")
