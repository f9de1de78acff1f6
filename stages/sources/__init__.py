"""Where checkpoints come from: a local directory, or a hub repository at a pinned revision.

Each gives a listing of files with kinds and sizes. A hub gives headers and tensors by range requests, too, so that a checkpoint is
known before a weight byte is moved, and files that are checked before they take their name.
"""

from __future__ import annotations

from stages.errors import UserError
from stages.settings import SourceSettings
from stages.sources.files import SourceFile
from stages.sources.hub import Hub
from stages.sources.local import list_directory


def list_files(source: SourceSettings) -> list[SourceFile]:
    """Every file of the checkpoint, with kinds, sizes in bytes and, from a hub, sha256 of the large ones.

    UserError when there is no shard or no config.json, a name or link leaves the checkpoint, the hub refuses, or the
    shards are not those that source.shards pins.
    """
    files = Hub(source).list_files() if source.repository else list_directory(source)
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
