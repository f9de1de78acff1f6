"""The files of a checkpoint: which kind each is by its name, and which names are safe to write down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from stages.checkpoint.header import INDEX
from stages.errors import UserError

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".distcp")  # the same weights once more


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint. kind: shard, index, config, auxiliary or ignored; sha256 of large files or git's sha1 of small ones, where a
    hub gives one. A local file, which nobody has hashed, is known by its size and by the time of its last change."""

    name: str
    size: int
    sha256: str | None
    kind: str
    git_sha1: str | None = None
    mtime_ns: int | None = None


def kind_of(name: str) -> str:
    """The kind of a file by its name, as SourceFile has it."""
    if "/" not in name and name.endswith(".safetensors"):
        return "shard"
    if name in (INDEX, "config.json"):
        return "index" if name == INDEX else "config"
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return "ignored" if hidden or name.lower().endswith((*OTHER_WEIGHTS, ".safetensors")) else "auxiliary"


def is_plain(name: str) -> bool:
    """Whether every JSON result can carry the name, and no system reads a separator of directories in it but the slash."""
    return "\\" not in name and not any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in name)


def safe_name(name: str, where: str) -> str:
    """The name, if it stays inside a directory and can be written down; else UserError.

    Refused: absolute names, `..`, backslashes (a separator elsewhere), and control characters or bytes that are no UTF-8,
    which no JSON result could carry.
    """
    path = PurePosixPath(name)
    if not is_plain(name):
        raise UserError(f"{where}: names the file {name!r}: control characters, backslashes and what is not UTF-8 are not "
                        "accepted; rename or remove it")
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise UserError(f"{where}: names the file {name!r}, which would leave the directory; do not trust this checkpoint")
    return name
