"""Brings a checkpoint's files to where they are worked on: its metadata at once, its shards one by one when they are needed.

A source is a local directory or a hub repository at a pinned revision. Metadata is everything but the weights: a listing
with sizes and hashes, the auxiliary files byte for byte, and the headers of *all* shards, which for a hub come by range
requests of a few kilobytes each, so that a 212-GB checkpoint is inspected and planned before a weight byte is moved.

Shards of a hub are resumed: what is downloaded lies under a stable name (`<shard>.incomplete`) and the next run goes on
behind it, which the hub client's own cache does not do across processes. Size and, where the hub gives one, sha256 are
checked before the file takes its name. A local shard is only linked: the original is never moved, copied or written to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.checkpoint.files import (CHUNK, atomic_write, human_bytes, read_json, sync_directory, write_json)
from stages.checkpoint.header import LFS_POINTER, Header, header_length, parse_header, read_header
from stages.errors import UserError, exit_with_one_line
from stages.settings import Settings, SourceSettings, load, stage_parser

INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")  # the same weights once more
FIRST_BYTES = 64  # of a shard: the length of its header, or enough to recognize an LFS pointer
DISK_MARGIN = 1.01
ATTEMPTS = 5  # at a file, waiting 1, 2, 4, 8 s in between; each goes on behind the bytes that came


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint. kind: shard, index, config, auxiliary or ignored; sha256 where the hub gives one."""

    name: str
    size: int
    sha256: str | None
    kind: str


def _kind(name: str) -> str:
    if "/" not in name and name.endswith(".safetensors"):
        return "shard"
    if name in (INDEX, "config.json"):
        return "index" if name == INDEX else "config"
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return "ignored" if hidden or name.endswith((*OTHER_WEIGHTS, ".safetensors")) else "auxiliary"


def safe_name(name: str, where: str) -> str:
    """The name, if it stays inside a directory; UserError for absolute names, `..`, backslashes and NUL."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise UserError(f"{where}: names the file {name!r}, which would leave the directory; do not trust this checkpoint")
    return name


def check_disk(directory: Path, needed_bytes: int, what: str) -> None:
    """UserError unless the disk that holds (or will hold) `directory` has room for `needed_bytes` and one percent."""
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * DISK_MARGIN:
        raise UserError(f"not enough disk: {what} needs {human_bytes(needed_bytes * DISK_MARGIN)}, {directory} has "
                        f"{human_bytes(free)} free; free some, or point results= to a larger disk")


def check_places(settings: Settings) -> None:
    """UserError when results and a local source are the same place or one lies in the other."""
    if not settings.source.path:
        return
    source = Path(settings.source.path).resolve()
    for place in (settings.source_directory.parent.resolve(), Path(settings.results).resolve()):
        if place == source or source in place.parents:
            raise UserError(f"results={settings.results}: lies in the source {source}; choose a directory outside of it")
    for place in (settings.source_directory.parent.resolve(), settings.run_directory.resolve()):
        if place in source.parents:
            raise UserError(f"source.path={source}: lies in the results {place} of this run; choose other results")


# --- local directories ------------------------------------------------------------------------------------------------


def _list_local(source: SourceSettings) -> list[SourceFile]:
    root = Path(source.path)
    if not root.is_dir():
        raise UserError(f"source.path={source.path}: no such directory; name a checkpoint directory")
    files = []
    for directory, subdirectories, names in os.walk(root):  # directory links are not followed
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            if not path.is_file():
                kind = "its target is missing" if path.is_symlink() else "it is no regular file"
                raise UserError(f"{path}: cannot be read, {kind}; complete the checkpoint or remove the name")
            target = path.resolve()
            if path.is_symlink() and _kind(relative) != "shard" and not (
                    target.is_relative_to(root.resolve()) or target.parent.name == "blobs"):
                raise UserError(f"{path}: is a link that leaves the checkpoint, to {target}; replace it by the file if it "
                                "belongs to it")
            files.append(SourceFile(relative, path.stat().st_size, None, _kind(relative)))
    return files


# --- hub repositories -------------------------------------------------------------------------------------------------


def _hub_error(source: SourceSettings, what: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    place = f"{source.repository}@{source.revision[:12]}"
    remedies = (
        (errors.GatedRepoError, "access must be granted: accept the licence on the hub and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such repository, or it is private: check source.repository and set HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such revision: check source.revision"),
        (errors.EntryNotFoundError, "no such file at this revision: check source.shards"),
    )
    for kind, remedy in remedies:
        if isinstance(error, kind):
            return UserError(f"{place}: {what}: {remedy}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(f"{place}: {what}: the hub refused with {status}; set HF_TOKEN to a token with access")
    text = " ".join(str(error).split("For more information")[0].split())[:160] or type(error).__name__
    return UserError(f"{place}: {what}: {text}; run the same command again to go on, finished bytes are kept")


class Hub:
    """A repository at a pinned revision. Endpoint and token come from the environment (HF_ENDPOINT, HF_TOKEN)."""

    def __init__(self, source: SourceSettings):
        from huggingface_hub import HfApi

        self.source = source
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.api = HfApi(endpoint=self.endpoint, token=os.environ.get("HF_TOKEN") or None)

    def _errors(self) -> tuple[type[Exception], ...]:
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import get_session

        transport = type(get_session()).__module__.split(".")[0]  # the client's HTTP library has changed its name before
        return HfHubHTTPError, __import__(transport).HTTPError, OSError, ValueError

    def list_files(self) -> list[SourceFile]:
        """All files of the revision with sizes, and sha256 of those that the hub stores as large files."""
        try:
            info = self.api.model_info(self.source.repository, revision=self.source.revision, files_metadata=True)
        except self._errors() as error:
            raise _hub_error(self.source, "listing its files", error) from None
        files = []
        for entry in sorted(info.siblings, key=lambda sibling: sibling.rfilename):
            name = safe_name(entry.rfilename, self.source.repository)
            if entry.size is None:
                raise UserError(f"{self.source.repository}: the hub gives no size for {name}; it cannot be checked, try "
                                "again later")
            files.append(SourceFile(name, entry.size, entry.lfs.sha256 if entry.lfs else None, _kind(name)))
        return files

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.source.repository, name, revision=self.source.revision, endpoint=self.endpoint)

    def read_range(self, name: str, begin: int, end: int, size: int) -> bytes:
        """Bytes begin..end of a file of `size` bytes, and no more, whatever the server sends."""
        from huggingface_hub.utils import hf_raise_for_status
        from huggingface_hub.utils._http import http_stream_backoff

        headers = self.api._build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with http_stream_backoff("GET", self._url(name), headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                if response.status_code == 206 and total not in ("", "*", str(size)):
                    raise UserError(f"{self.source.repository}: {name} has {total} bytes, the hub listed {size}; the "
                                    "repository is being changed, check source.revision")
                skip = 0 if response.status_code == 206 else begin  # a server that ignores Range starts at 0
                data = b""
                for chunk in response.iter_bytes(1 << 16):
                    data += chunk
                    if len(data) >= skip + end - begin:
                        break
        except self._errors() as error:
            raise _hub_error(self.source, f"reading the header of {name}", error) from None
        data = data[skip:skip + end - begin]
        if len(data) != end - begin:
            raise UserError(f"{self.source.repository}: {name}: asked for bytes {begin} to {end}, got {len(data)}; try "
                            "again")
        return data

    def read_header(self, name: str, size: int) -> Header:
        """Header of a shard, by two range requests."""
        where = f"{self.source.repository}/{name}"
        length = header_length(self.read_range(name, 0, min(FIRST_BYTES, size), size) if size else b"", size, where)
        return parse_header(self.read_range(name, 8, 8 + length, size), size, where)

    def fetch(self, file: SourceFile, target: Path) -> None:
        """Downloads a file to `target`, going on behind what an interrupted run left, and checks size and sha256."""
        from huggingface_hub.file_download import http_get

        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".incomplete")
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        for attempt in range(ATTEMPTS):
            done = part.stat().st_size if part.exists() else 0
            check_disk(target.parent, file.size - done, file.name)
            try:
                with open(part, "ab") as output:
                    if file.size > done:
                        http_get(self._url(file.name), output, resume_size=done, headers=self.api._build_hf_headers(),
                                 expected_size=file.size, displayed_filename=file.name)
                    output.flush()
                    os.fsync(output.fileno())
                break
            except self._errors() as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if attempt == ATTEMPTS - 1 or (status < 500 and status not in (408, 429)):
                    raise _hub_error(self.source, f"downloading {file.name}", error) from None
                time.sleep(2**attempt)
        check_bytes(part, file, self.source.repository)
        os.replace(part, target)
        sync_directory(target.parent)


def check_bytes(path: Path, file: SourceFile, where: str) -> None:
    """Size and, where known, sha256 of a downloaded file; a wrong one is deleted and refused."""
    found = path.stat().st_size
    digest, head = hashlib.sha256(), b""
    with open(path, "rb") as opened:
        while chunk := opened.read(CHUNK):
            head = head or chunk[:len(LFS_POINTER)]
            digest.update(chunk)
    what = None
    if head == LFS_POINTER and file.kind == "shard":
        what = "is a Git LFS pointer, not the data"
    elif found != file.size:
        what = f"has {found} bytes, the hub listed {file.size}"
    elif file.sha256 and digest.hexdigest() != file.sha256:
        what = f"has sha256 {digest.hexdigest()[:12]}..., the hub listed {file.sha256[:12]}..."
    if what:
        path.unlink()
        raise UserError(f"{where}: {file.name} {what}; the download was deleted, run again")


# --- the stage --------------------------------------------------------------------------------------------------------


def list_files(source: SourceSettings) -> list[SourceFile]:
    """Every file of the checkpoint, with kinds; UserError when it has no shard or no config.json."""
    files = Hub(source).list_files() if source.repository else _list_local(source)
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


def _index_anomalies(directory: Path, headers: dict[str, Header], place: str) -> list[str]:
    """Checks the index, where there is one, against the headers; returns what is odd about it but harmless."""
    if not (directory / INDEX).exists():
        return []
    index = read_json(directory / INDEX, "download --metadata")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{place}: {INDEX} has no weight_map of names; restore the original")
    for name, shard in weight_map.items():
        safe_name(shard, INDEX)
        if shard not in headers:
            raise UserError(f"{place}: {INDEX} names {shard} (for {name}), which is not there; the checkpoint is "
                            "incomplete, download the missing shard")
        if name not in headers[shard].tensors:
            elsewhere = next((s for s, header in headers.items() if name in header.tensors), None)
            where = f"it is in {elsewhere}" if elsewhere else "no shard has it"
            raise UserError(f"{place}: {INDEX} says that {name} is in {shard}, but {where}; the checkpoint is inconsistent, "
                            "get it again")
    unlisted = sum(name not in weight_map for header in headers.values() for name in header.tensors)
    anomalies = [f"{INDEX} omits {unlisted} tensors that the shards hold"] if unlisted else []
    strangers = sorted(set(headers) - set(weight_map.values()))
    if strangers:
        anomalies.append(f"{INDEX} does not name {', '.join(strangers)}")
    return anomalies


def fetch_metadata(settings: Settings) -> None:
    """Writes listing.json, headers.json and auxiliary/ into results/<source>/source."""
    check_places(settings)
    source, directory = settings.source, settings.source_directory
    files = list_files(source)
    hub = Hub(source) if source.repository else None
    place = source.repository or str(source.path)
    auxiliary = directory / "auxiliary"
    building = directory / "auxiliary.part"
    shutil.rmtree(building, ignore_errors=True)
    try:
        for file in files:
            if file.kind in ("auxiliary", "config", "index"):
                check_disk(directory, file.size, file.name)
                if hub:
                    hub.fetch(file, building / file.name)
                else:
                    with atomic_write(building / file.name) as output, open(Path(source.path) / file.name, "rb") as original:
                        shutil.copyfileobj(original, output, CHUNK)
        headers: dict[str, Header] = {}
        where: dict[str, str] = {}
        for file in files:
            if file.kind != "shard":
                continue
            header = hub.read_header(file.name, file.size) if hub else read_header(Path(source.path) / file.name)
            headers[file.name] = header
            for name in header.tensors:
                if name in where:
                    raise UserError(f"{place}: tensor {name} is in two shards, {where[name]} and {file.name}; remove the "
                                    "stale file")
                where[name] = file.name
        anomalies = _index_anomalies(building, headers, place)
        shutil.rmtree(auxiliary, ignore_errors=True)
        os.replace(building, auxiliary)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    write_json(directory / "headers.json", {
        shard: {"file_size": header.file_size, "metadata": header.metadata, "data_start": header.data_start,
                "tensors": {name: [info.dtype, list(info.shape), info.begin, info.end]
                            for name, info in header.tensors.items()}}
        for shard, header in headers.items()})
    write_json(directory / "listing.json", {
        "repository": source.repository, "revision": source.revision, "anomalies": anomalies,
        "files": {file.name: {"bytes": file.size, "sha256": file.sha256, "kind": file.kind} for file in files}})
    shards = [file for file in files if file.kind == "shard"]
    print(f"{place}: {len(shards)} shards, {human_bytes(sum(file.size for file in shards))}, "
          f"{sum(file.kind != 'shard' for file in files)} other files")


def fetch_shard(settings: Settings, shard: str) -> Path:
    """Makes one shard available to this run and returns its path: linked from a local source, else downloaded."""
    check_places(settings)
    listing = read_json(settings.source_directory / "listing.json", "download --metadata")["files"]
    if listing.get(shard, {}).get("kind") != "shard":
        raise UserError(f"--shard {shard}: not a shard of {settings.source.name}; it has "
                        f"{', '.join(name for name, entry in listing.items() if entry['kind'] == 'shard')}")
    file = SourceFile(shard, listing[shard]["bytes"], listing[shard]["sha256"], "shard")
    target = settings.shard_directory / shard
    if settings.source.repository:
        if not target.exists():
            Hub(settings.source).fetch(file, target)
        return target
    original = Path(settings.source.path).resolve() / shard
    if not original.exists():
        raise UserError(f"{original} is missing, it was there when the source was listed; put it back")
    if original.stat().st_size != file.size:
        raise UserError(f"{original} has {original.stat().st_size} bytes, {file.size} when the source was listed; run "
                        "download --metadata again")
    target.parent.mkdir(parents=True, exist_ok=True)
    link = target.with_name(f"{shard}.link.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(original)
    os.replace(link, target)
    return target


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    parser = stage_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metadata", action="store_true", help="listing, headers and auxiliary files")
    what.add_argument("--shard", help="file name of one shard")
    arguments = parser.parse_args()
    settings = load(arguments.overrides)
    if arguments.metadata:
        fetch_metadata(settings)
    else:
        fetch_shard(settings, arguments.shard)


if __name__ == "__main__":
    main()
