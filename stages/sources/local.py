"""Local checkpoint directories: what is listed, which links belong to it, and what Snakemake is told to watch."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from stages.checkpoint.files import from_here
from stages.errors import UserError
from stages.records import ListedFile
from stages.settings import SourceSettings
from stages.sources.files import SourceFile, is_plain, kind_of, safe_name


def _stays(target: Path, root: Path) -> bool:
    """Whether a link's target belongs to the checkpoint: inside it, or a blob of a hub cache (blobs/ beside snapshots/)."""
    return target.is_relative_to(root) or (target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir())


def _refuse_to_walk(error: OSError):
    raise error  # os.walk would leave out what it may not read, and the checkpoint would look complete


def directory_of(source: SourceSettings) -> str | None:
    """The directory that source.path leads to, over whatever links: one that was turned to another checkpoint is another source."""
    return from_here(Path(source.path).resolve()) if source.path else None


def list_directory(source: SourceSettings) -> list[SourceFile]:
    """All files of the directory with sizes, without those of hidden directories; UserError for one that could not be published."""
    root = Path(source.path)
    if not root.is_dir():
        raise UserError(f"source.path={source.path}: no such directory; name a checkpoint directory")
    files = []
    for directory, subdirectories, names in os.walk(root, onerror=_refuse_to_walk):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in subdirectories:
            if (Path(directory) / name).is_symlink():
                raise UserError(f"{Path(directory) / name}: is a link to a directory, whose files would be left out; replace it by the directory if "
                                "it belongs to the checkpoint")
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            kind = kind_of(relative)
            if kind == "ignored" and not (path.is_file() and is_plain(relative)):
                continue  # odd, but nobody needs it
            if not path.is_file():
                why = "its target is missing" if path.is_symlink() else "it is no regular file"
                raise UserError(f"{path}: cannot be read, {why}; complete the checkpoint or remove the name")
            safe_name(relative, f"source.path={source.path}")
            target = path.resolve()
            # a linked shard is only read; a linked auxiliary file would be published
            if path.is_symlink() and kind not in ("shard", "ignored") and not _stays(target, root.resolve()):
                raise UserError(f"{path}: is a link that leaves the checkpoint, to {target}; replace it by the file if it "
                                "belongs to it")
            status = path.stat()
            files.append(SourceFile(relative, status.st_size, None, kind, mtime_ns=status.st_mtime_ns))
    return files


def check_file(source: SourceSettings, name: str, entry: ListedFile) -> None:
    """UserError unless a local source's file is still the one that `fetch_metadata` listed, in listing.json's `entry`."""
    path = Path(source.path).resolve() / name
    if not path.exists():
        raise UserError(f"{path} is missing, it was there when the source was listed; put it back")
    status = path.stat()
    if status.st_size != entry.get("bytes"):
        raise UserError(f"{path} has {status.st_size} bytes, {entry.get('bytes')} when the source was listed; run download --metadata again")
    if status.st_mtime_ns != entry.get("mtime_ns"):
        raise UserError(f"{path} was changed since the source was listed; run download --metadata again")


def local_files(source: SourceSettings) -> list[str]:
    """Paths of a local source's files that a release depends on, so that Snakemake notices a changed one; none for a hub, whose revision
    cannot change. A name with what Snakemake reads as a wildcard is not watched."""
    files = list_directory(source) if source.path else []
    return [str(Path(source.path) / file.name) for file in files if file.kind != "ignored" and not re.search(r"[{}*?]", file.name)]


def identities(paths: list[str]) -> list[tuple[str, tuple[int, int]]]:
    """(path, (bytes, time of the last change in ns)): a file that was replaced by an older one is another one, too.

    UserError for one that is dated in the future, which Snakemake would only say when the job is done.
    """
    result = []
    for path in paths:
        status = os.stat(path)
        if status.st_mtime > time.time() + 1:
            raise UserError(f"{path}: is dated in the future, so that nothing made from it would count as newer: touch it, or set the clock")
        result.append((path, (status.st_size, status.st_mtime_ns)))
    return result
