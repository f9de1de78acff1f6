"""Brings a checkpoint's files to where they are worked on: its metadata at once, its shards one by one when they are needed.

A source is a local directory or a hub repository at a pinned revision. Metadata is everything but the weights: a listing
with sizes and hashes, the auxiliary files byte for byte, and the headers of *all* shards, which for a hub come by range
requests of a few kilobytes each, so that a 212-GB checkpoint is inspected and planned before a weight byte is moved.

Shards of a hub are resumed: what is downloaded lies under a stable name (`<shard>.incomplete`) and the next run goes on
behind it, which the hub client's own cache does not do across processes. Size and, where the hub gives one, sha256 are
checked before the file takes its name. A local shard is only linked: the original is never moved, copied or written to.

The environment says how to reach the hub: HF_TOKEN (for private and gated repositories), HF_ENDPOINT (a mirror).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.checkpoint.files import CHUNK, atomic_write, check_disk, human_bytes, read_json, sync_directory, write_json
from stages.checkpoint.header import INDEX, LFS_POINTER, Header, header_length, parse_header, read_header
from stages.errors import UserError, exit_with_one_line
from stages.settings import Settings, SourceSettings, load, stage_parser

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")  # the same weights once more
FIRST_BYTES = 64  # of a shard: the length of its header, or enough to recognize an LFS pointer
ATTEMPTS = 5  # without a new byte, waiting 1, 2, 4, 8 s in between; each goes on behind the bytes that came
LONGEST_WAIT = 60  # seconds that a hub which limits the rate may ask for


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


def _is_plain(name: str) -> bool:
    return "\\" not in name and not any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in name)


def safe_name(name: str, where: str) -> str:
    """The name, if it stays inside a directory and can be written down; else UserError.

    Refused: absolute names, `..`, backslashes (a separator elsewhere), and control characters or bytes that are no UTF-8,
    which no JSON result could carry.
    """
    path = PurePosixPath(name)
    if not _is_plain(name):
        raise UserError(f"{where}: names the file {name!r}: control characters, backslashes and what is not UTF-8 are not "
                        "accepted; rename or remove it")
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise UserError(f"{where}: names the file {name!r}, which would leave the directory; do not trust this checkpoint")
    return name


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


def _stays(target: Path, root: Path) -> bool:
    """Whether a link's target belongs to the checkpoint: inside it, or a blob of a hub cache (blobs/ beside snapshots/)."""
    return target.is_relative_to(root) or (target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir())


def _refuse_to_walk(error: OSError):
    raise error  # os.walk would leave out what it may not read, and the checkpoint would look complete


def _list_local(source: SourceSettings) -> list[SourceFile]:
    root = Path(source.path)
    if not root.is_dir():
        raise UserError(f"source.path={source.path}: no such directory; name a checkpoint directory")
    files = []
    for directory, subdirectories, names in os.walk(root, onerror=_refuse_to_walk):  # directory links are not followed
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            kind = _kind(relative)
            if kind == "ignored" and not (path.is_file() and _is_plain(relative)):
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
            files.append(SourceFile(relative, path.stat().st_size, None, kind))
    return files


def local_files(source: SourceSettings) -> list[str]:
    """Paths of a local source's files that a release depends on, so that Snakemake notices a changed one; none for a hub, whose revision
    cannot change. A name with what Snakemake reads as a wildcard is not watched."""
    files = _list_local(source) if source.path else []
    return [str(Path(source.path) / file.name) for file in files if file.kind != "ignored" and not re.search(r"[{}*?]", file.name)]


# --- hub repositories -------------------------------------------------------------------------------------------------


def _hub_error(source: SourceSettings, what: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    place = f"{source.repository}@{source.revision[:12]}" if source.revision else source.repository
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
    if status is None and not isinstance(error, ValueError):
        text += "; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return UserError(f"{place}: {what}: {text}; run the same command again to go on, finished bytes are kept")


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed in a moment: no connection, a cut one, 408, 429, 5xx."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, (ValueError, OfflineModeIsEnabled))


def _asked_wait(error: Exception) -> int:
    """Seconds of a Retry-After header, if there is one that says seconds."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return min(int(text), LONGEST_WAIT) if text.isascii() and text.isdigit() else 0


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

    def _patiently(self, what: str, action: Callable[[], object], received: Callable[[], int] = lambda: 0):
        """`action()`, again after failures that pass, with growing pauses and no more than ATTEMPTS times in vain.

        `received` counts the bytes that have come: a failure behind new bytes is the first one again, so that a flaky line
        brings a large shard home in any number of pieces. Raises UserError with the remedy when the hub means it; an
        OSError of the local disk is passed on as it is.
        """
        failures, most = 0, received()
        while True:
            try:
                return action()
            except self._errors() as error:
                if isinstance(error, OSError) and error.errno is not None and not isinstance(
                        error, (ConnectionError, TimeoutError)):
                    raise
                failures, most = (1, received()) if received() > most else (failures + 1, most)
                if failures == ATTEMPTS or not _is_passing(error):
                    raise _hub_error(self.source, what, error) from None
                time.sleep(max(2 ** (failures - 1), _asked_wait(error)))

    def list_files(self) -> list[SourceFile]:
        """All files of the revision with sizes, and sha256 of those that the hub stores as large files."""
        info = self._patiently("listing its files", lambda: self.api.model_info(
            self.source.repository, revision=self.source.revision, files_metadata=True))
        if info.sha != self.source.revision:
            raise UserError(f"{self.source.repository}: asked for revision {self.source.revision}, the hub answered with "
                            f"{info.sha}; check source.revision and HF_ENDPOINT")
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

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=os.environ.get("HF_TOKEN") or None)

    def read_range(self, name: str, begin: int, end: int, size: int) -> bytes:
        """Bytes begin..end (end not included) of a file of `size` bytes, and no more, whatever the server sends.

        A server that ignores ranges starts at 0; its answer is read up to `end` and cut off there. UserError for an answer
        with another range than the one asked for, or when `size` is not the file's.
        """
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import get_session, hf_raise_for_status

        headers = self._headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        promised = f"bytes {begin}-{end - 1}/{size}"

        def once() -> bytes:
            with get_session().stream("GET", self._url(name), headers=headers, follow_redirects=True,
                                      timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
                hf_raise_for_status(response)
                partial = response.status_code == 206
                answered = response.headers.get("Content-Range", "")
                if partial and answered.strip().lower() != promised:
                    raise UserError(f"{self.source.repository}: {name}: asked for {promised}, the server answered "
                                    f"{answered[:60]!r}; the repository is being changed or a proxy is in the way, check "
                                    "source.revision and HF_ENDPOINT")
                wanted = end - begin if partial else end
                data = bytearray()
                for chunk in response.iter_bytes(1 << 16):
                    data += chunk
                    if len(data) > wanted or (len(data) == wanted and not partial):
                        break  # an answer of the right length is read to its end, so that the connection serves the next
            if len(data) < wanted or (partial and len(data) > wanted):
                raise ConnectionError(f"asked for {promised}, {len(data)} bytes came")
            return bytes(data[wanted - (end - begin):wanted])

        return self._patiently(f"reading the header of {name}", once)

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

        def received() -> int:
            return part.stat().st_size if part.exists() else 0

        def once() -> None:
            done = received()
            check_disk(target.parent, file.size - done, file.name)
            with open(part, "ab") as output:
                if file.size > done:
                    http_get(self._url(file.name), output, resume_size=done, headers=self._headers(),
                             expected_size=file.size, displayed_filename=file.name)
                output.flush()
                os.fsync(output.fileno())

        self._patiently(f"downloading {file.name}", once, received)
        check_bytes(part, file, self.source.repository)
        os.replace(part, target)
        sync_directory(target.parent)


def resolve(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """(commit, shards) of a repository's branch, tag or commit; of its main branch if none is given."""
    hub = Hub(SourceSettings(repository=repository, revision=revision))
    info = hub._patiently("finding its revision", lambda: hub.api.model_info(repository, revision=revision))
    names = sorted(sibling.rfilename for sibling in info.siblings)
    shards = [safe_name(name, repository) for name in names if _kind(name) == "shard"]
    if not shards:
        raise UserError(f"{repository}: no *.safetensors file at its top; name a checkpoint's repository")
    return info.sha, shards


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
    """Every file of the checkpoint, with kinds, sizes in bytes and, from a hub, sha256 of the large ones.

    UserError when there is no shard or no config.json, a name or link leaves the checkpoint, the hub refuses, or the
    shards are not those that source.shards pins.
    """
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
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {INDEX} is not valid JSON ({str(error)[:120]}); restore the original") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
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


def read_tensor_bytes(settings: Settings, shard: str, name: str) -> bytes:
    """Bytes of one tensor of a hub source's shard by a range request; the header that `fetch_metadata` saw says where."""
    record = read_json(settings.source_directory / "headers.json", "download --metadata")[shard]
    _, _, begin, end = record["tensors"][name]
    start = record["file_size"] - max(entry[3] for entry in record["tensors"].values())  # data ends where the file ends
    return Hub(settings.source).read_range(shard, start + begin, start + end, record["file_size"])


def _record(header: Header) -> dict:
    """A header as headers.json keeps it: begin and end are bytes from data_start."""
    return {"file_size": header.file_size, "metadata": header.metadata, "data_start": header.data_start,
            "tensors": {name: [info.dtype, list(info.shape), info.begin, info.end] for name, info in header.tensors.items()}}


def fetch_metadata(settings: Settings) -> None:
    """Writes listing.json, headers.json and auxiliary/ into results/<source>/source; moves no weight byte.

    Raises UserError for what `list_files` refuses, a damaged header, a tensor in two shards, or an index that names shards
    or tensors that are not there. What the index merely omits is read from the headers and noted as an anomaly.
    """
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
    write_json(directory / "headers.json", {shard: _record(header) for shard, header in headers.items()})
    write_json(directory / "listing.json", {
        "path": source.path, "repository": source.repository, "revision": source.revision, "anomalies": anomalies,
        "files": {file.name: {"bytes": file.size, "sha256": file.sha256, "kind": file.kind} for file in files}})
    shards = [file for file in files if file.kind == "shard"]
    print(f"{place}: {len(shards)} shards, {human_bytes(sum(file.size for file in shards))}, "
          f"{sum(file.kind != 'shard' for file in files)} other files")


def fetch_shard(settings: Settings, shard: str) -> Path:
    """Makes one shard available to this run and returns its path: linked from a local source, else downloaded.

    Either way its size and header are those that `fetch_metadata` recorded, because the plan was made from them; UserError
    if not, if the hub refuses, or if the disk is too small for what is still to come.
    """
    check_places(settings)
    listing = read_json(settings.source_directory / "listing.json", "download --metadata")["files"]
    if listing.get(shard, {}).get("kind") != "shard":
        raise UserError(f"--shard {shard}: not a shard of {settings.source.name}; it has "
                        f"{', '.join(name for name, entry in listing.items() if entry['kind'] == 'shard')}")
    file = SourceFile(shard, listing[shard]["bytes"], listing[shard]["sha256"], "shard")
    target = settings.shard_directory / shard
    if settings.source.repository:
        if not target.exists() or target.stat().st_size != file.size:
            Hub(settings.source).fetch(file, target)
        _check_header(settings, shard, target)
        return target
    original = Path(settings.source.path).resolve() / shard
    if not original.exists():
        raise UserError(f"{original} is missing, it was there when the source was listed; put it back")
    if original.stat().st_size != file.size:
        raise UserError(f"{original} has {original.stat().st_size} bytes, {file.size} when the source was listed; run "
                        "download --metadata again")
    _check_header(settings, shard, original)
    target.parent.mkdir(parents=True, exist_ok=True)
    link = target.with_name(f"{shard}.link.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(original)
    os.replace(link, target)
    return target


def _check_header(settings: Settings, shard: str, path: Path) -> None:
    """UserError unless the shard's header is the recorded one; two shards of one size may have been swapped since."""
    recorded = read_json(settings.source_directory / "headers.json", "download --metadata").get(shard)
    if _record(read_header(path)) != recorded:
        raise UserError(f"{path}: its header is not the one that was inspected; the checkpoint changed, run download "
                        "--metadata again")


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    parser = stage_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metadata", action="store_true", help="listing, headers and auxiliary files")
    what.add_argument("--shard", help="one shard, for example model-00002.safetensors; needs --metadata first")
    arguments = parser.parse_args()
    settings = load(arguments.overrides)
    if arguments.metadata:
        fetch_metadata(settings)
    else:
        fetch_shard(settings, arguments.shard)


if __name__ == "__main__":
    main()
