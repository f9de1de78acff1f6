"""Where checkpoints come from: a local directory, or a hub repository at a pinned revision.

Each gives a listing of files with kinds and sizes. A hub gives headers and tensors by range requests, too, so that a checkpoint is
known before a weight byte is moved, and files that are checked before they take their name.
"""

from __future__ import annotations

import re
from pathlib import Path

from stages.errors import UserError
from stages.settings import SourceSettings
from stages.sources.files import SourceFile
from stages.sources.hub import Hub
from stages.sources.local import list_directory

SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


def list_files(source: SourceSettings, hub: Hub | None) -> list[SourceFile]:
    """Every file of the checkpoint, with kinds, sizes in bytes and, from a hub, sha256 of the large ones. hub: the source's; None for a local one.

    UserError when there is no shard or no config.json, a name or link leaves the checkpoint, the hub refuses, or the
    shards are not those that source.shards pins.
    """
    files = hub.list_files() if hub else list_directory(source)
    place = source.repository or f"source.path={source.path}"
    kinds = {file.kind for file in files}
    if "shard" not in kinds:
        raise UserError(f"{place}: no *.safetensors file there; name a checkpoint directory")
    if "config" not in kinds:
        raise UserError(f"{place}: config.json is missing; complete the checkpoint")
    found = {file.name for file in files if file.kind == "shard"}
    if source.repository and found != set(source.shards):
        raise UserError(f"{place}: source.shards does not name the repository's shards: not there "
                        f"{sorted(set(source.shards) - found)[:3]}, not named {sorted(found - set(source.shards))[:3]}")
    return files


def shards_of(source: SourceSettings) -> list[str]:
    """Shard file names of a source: pinned for a hub repository, read off the directory for a local one."""
    if source.repository:
        return [_shard_name(name, source.repository) for name in source.shards]
    directory = Path(source.path)
    names = sorted(path.name for path in directory.glob("*.safetensors")) if directory.is_dir() else []
    if not names:
        raise UserError(f"source.path={source.path}: {'no *.safetensors file there' if directory.is_dir() else 'no such directory'}; name a checkpoint "
                        "directory")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory / missing[0]}: is a link to a file that is missing, or no file; complete the checkpoint")
    return [_shard_name(name, f"source.path={source.path}") for name in names]


def _shard_name(name: str, where: str) -> str:
    """The name, if it is one that a publisher would give: it becomes part of command lines and of Snakemake's patterns."""
    if not SHARD_NAME.fullmatch(name):
        raise UserError(f"{where}: has a shard named {name!r}; only letters, digits, '.', '_' and '-' are accepted, rename it")
    return name
