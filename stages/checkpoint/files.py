"""Files that are there whole or not at all: write beside, sync, rename, sync the directory; and whether the disk has room for them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError

CHUNK = 8 << 20  # bytes read or written at a time
DIRECT = getattr(os, "O_DIRECT", 0)  # past the page cache; only whole pages can be written so
DISK_MARGIN = 1.01
ON_ONE_LINE = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def memory(size: int) -> memoryview:
    """Bytes to read into or to write from, which begin at a page's edge.

    Direct writes need that. And on AMD's Zen 3 copying from the page cache runs at a quarter of its speed when the destination lies 1 to 31 bytes
    past the source within a page, as large bytearrays do for a file that is read from its beginning.
    """
    return memoryview(mmap.mmap(-1, max(1, size)))[:size]


def from_here(path: Path | str) -> str:
    """A path in one spelling, however it was given: from the working directory for what lies in it, else from the root. Links keep their names."""
    whole = Path(os.path.abspath(path))
    if whole.resolve() != Path(path).resolve():
        return str(path)  # `..` behind a link leads elsewhere
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)


def sync_directory(directory: Path) -> None:
    """Makes a rename durable: without it a power loss can forget the new name."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_direct(path: Path, flags: int) -> int:
    """A file to write past the page cache, or an ordinary one where the file system has no such thing."""
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def lock(handle: int, wait: bool = False) -> bool:
    """False where another process has locked this open file; the lock ends with the process, or when the file is closed.

    Some network file systems know no locks and always say yes.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_named(handle: int, path: Path) -> bool:
    """Whether an open file still has this name: whoever held its lock may have renamed it."""
    try:
        there, ours = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _locked(part: Path, direct: bool) -> int:
    """An empty file under this name that no other process writes; what an earlier, killed one left is emptied.

    Small files wait for each other; a large one (`direct`) that somebody else is writing is refused. The lock ends with the process.
    """
    while True:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        handle = _open_direct(part, flags) if direct else os.open(part, flags, 0o666)
        try:
            if not lock(handle, wait=not direct):
                raise UserError(f"{part}: another process is writing this file; wait for it or stop it, then run again")
            if is_named(handle, part):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def naming(path: Path):
    """An OSError of reading or writing an open file, which knows it by number only, gets its name."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path, direct: bool = False):
    """Yields a binary file that takes `path`'s name only after everything was written and synced.

    Whatever goes wrong, a full disk included, leaves no partial file behind; after a kill the next writer reuses its name. With
    `direct` writes go past the page cache, where that is possible, and the caller heeds what they need.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with naming(path), open(_locked(part, direct), "wb", 0 if direct else -1) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)  # while it is locked
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


@contextmanager
def only_one(path: Path, doing: str):
    """UserError where another process is in a block with the same lock file; `doing` says what it does. The lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "w") as file:
        if not lock(file.fileno()):
            raise UserError(f"{path.parent}: another process is {doing} there; wait for it or stop it, then run again")
        yield


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def render_json(value: object, allow_nan: bool = False) -> str:
    """The one way JSON is written: indented by 2, key order as given, ending with a newline.

    allow_nan: also NaN and Infinity, which JSON does not have; only for a stranger's file that has them, since all its readers are Python's.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def render_rows(value: object, levels: int = 2, indent: str = "") -> str:
    """JSON of which `levels` levels of objects have a line for each key, and what lies deeper stands on that line.

    For tables of tensors: easier to read than `render_json`'s form, and written five times as fast, because Python's encoder in C does not indent.
    """
    if levels and isinstance(value, dict) and value:
        inner = indent + "  "
        lines = (f"{inner}{ON_ONE_LINE.encode(key)}: {render_rows(part, levels - 1, inner)}" for key, part in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return ON_ONE_LINE.encode(value)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, in the form of `render_json`."""
    write_text(path, render_json(value))


def write_rows(path: Path, value: dict, levels: int = 2) -> None:
    """Writes JSON atomically, in the form of `render_rows`, ending with a newline."""
    write_text(path, render_rows(value, levels) + "\n")


def read_json(path: Path, made_by: str | None = None, shown: Path | None = None) -> dict:
    """Reads a JSON object; a missing or broken one is named, and what to do.

    made_by: the stage that makes it; None for a file of somebody's checkpoint. shown: the original, where `path` is a copy of ours.
    """
    name, missing, damaged = shown or path, "complete the checkpoint, or name another directory", "restore the original"
    if made_by:
        missing, damaged = f"run {made_by} first", f"delete it and run {made_by} again"
    try:
        text = Path(path).read_text(encoding="utf-8")
        result = json.loads(text)
        if re.search(r"\\ud[89a-f]", text, re.I):  # half a surrogate pair, which could never be written again
            json.dumps(result, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{name} is missing: {missing}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({str(error)[:120]}): {damaged}") from None
    if not isinstance(result, dict):
        raise UserError(f"{name} is damaged (not an object in braces): {damaged}")
    return result


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memory(1 << 20)  # stays in the cache between reading and hashing
    with naming(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def hard_link(made: Path, target: Path) -> None:
    """Makes `target` another name of a file; UserError where the file system cannot do that."""
    try:
        os.link(made, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise UserError(f"{made}: cannot be linked into {target.parent} ({error.strerror}); both must be on one file system that knows hard "
                        "links") from None


def check_hard_links(one: Path, other: Path) -> None:
    """UserError unless files of one directory can have names in the other, too; makes both directories where they are missing."""
    probe, link = one / ".link", other / ".link"
    for directory in (one, other):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        probe.touch()
        link.unlink(missing_ok=True)
        hard_link(probe, link)
    finally:
        for path in (probe, link):
            path.unlink(missing_ok=True)


def human_bytes(count: float) -> str:
    """123305177640 -> '123.31 GB' (decimal units, as disks and model hubs count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def nearest_existing(path: Path) -> Path:
    """The path itself, absolute, or the nearest one above it that exists."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_disk(directory: Path, needed_bytes: int, what: str, remedy: str = "free some") -> None:
    """UserError unless the disk that holds (or will hold) `directory` has room for `needed_bytes` and one percent."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    if free < needed_bytes * DISK_MARGIN:
        raise UserError(f"not enough disk: {what} needs {human_bytes(needed_bytes * DISK_MARGIN)}, {directory} has "
                        f"{human_bytes(free)} free; {remedy}, or point results= to a larger disk")
