"""Whether the files are those of manifest.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stages.checkpoint.files import read_json, sha256_file
from stages.checkup.checkpoint import Checkpoint
from stages.checkup.faults import on_all_cores, some
from stages.checkup.json_checks import json_object
from stages.serving.plugin import PLUGIN

NOT_IN_MANIFEST = ("manifest.json", "README.md")
LEFT_BY_PIP = re.compile(rf"{PLUGIN.name}/(?:build/|[^/]*\.egg-info/|.*__pycache__/)")  # which builds where the sources are


def manifest(checkpoint: Checkpoint) -> Iterator[str]:
    """Every file has the size and the sha256 of manifest.json."""
    directory = checkpoint.directory
    path = directory / "manifest.json"
    if not path.exists():
        return
    files = json_object(read_json(path).get("files"), "manifest.json: files")
    names = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    present = {str(name) for name in names if not any(part.startswith(".") for part in name.parts)}  # .git, .cache of a download
    left = {name for name in present - files.keys() if LEFT_BY_PIP.match(name)}
    if left:
        checkpoint.notes.append(f"{min(left)}{f' and {len(left) - 1} more' if len(left) > 1 else ''}: left there by installing the plugin, do not publish it")
    yield from some(sorted(present - {*files, *NOT_IN_MANIFEST, *left}), "manifest.json does not list", "nothing vouches for its bytes")
    yield from on_all_cores(partial(_compare_file, checkpoint), files.items())
    checkpoint.counts["manifest"] = len(files)


def _compare_file(checkpoint: Checkpoint, item: tuple[str, object]) -> str | None:
    """The fault of a file that manifest.json lists."""
    name, entry = item
    file, entry = checkpoint.directory / name, json_object(entry, f"manifest.json: {name}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"manifest.json: lists {name!r}, which lies outside of the directory"
    if not file.is_file():
        return f"{name}: is missing"
    if file.stat().st_size != entry.get("bytes") or (not checkpoint.quick and sha256_file(file) != entry.get("sha256")):
        return f"{name}: its bytes are not those of manifest.json"
    return None
