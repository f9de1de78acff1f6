"""Hub repositories at a pinned revision: listing, ranges of files, downloads that are resumed, and errors in one line.

What a server or the line may do is expected here: refuse for a moment, stop in the middle, ignore ranges, answer with something
else. Endpoint and token come from the environment (HF_ENDPOINT, HF_TOKEN). The hub's client is imported when it is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from stages.checkpoint.files import CHUNK, check_disk, human_bytes, is_named, lock, sync_directory
from stages.checkpoint.header import LFS_POINTER, Header, header_length, parse_header
from stages.errors import UserError
from stages.settings import SourceSettings
from stages.sources.files import SourceFile, kind_of, safe_name

FIRST_BYTES = 64  # of a shard: the length of its header, or enough to recognize an LFS pointer
PAUSES = (1, 2, 4, 8, 16, 32, *[60] * 9)  # seconds between attempts without a new byte, ten minutes in all: a download runs for hours unattended
AT_THE_START = PAUSES[:4]  # before there is an answer at all, and somebody who has just started the run waits for it
LONGEST_WAIT = 60  # seconds that a hub which limits the rate may ask for


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
    text = _words(error)
    if status is None and not isinstance(error, ValueError):
        text += "; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return UserError(f"{place}: {what}: {text}; run the same command again to go on, finished bytes are kept")


def _words(error: Exception) -> str:
    """What an error says, on one line and without advice for programmers."""
    return " ".join(str(error).split("For more information")[0].split())[:160] or type(error).__name__


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


def _endpoint() -> str:
    """HF_ENDPOINT, or the public hub's; UserError where it is no address."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"HF_ENDPOINT={endpoint}: expected http://HOST[:PORT] or https://HOST[:PORT]")
    return endpoint


def _token() -> str | None:
    """HF_TOKEN without the line end that files of secrets have; a token is never shown."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and (token.isprintable() and " " not in token)):
        raise UserError("HF_TOKEN holds characters that no token has; copy it again")
    return token or None


class Hub:
    """A repository at a pinned revision."""

    def __init__(self, source: SourceSettings):
        try:
            from huggingface_hub import HfApi
        except ValueError as error:  # HF_HUB_DOWNLOAD_TIMEOUT=abc
            raise UserError(f"the hub's client cannot read one of the HF_ variables of the environment: {error}") from None

        self.source = source
        self.endpoint = _endpoint()
        self.api = HfApi(endpoint=self.endpoint, token=_token())

    def _errors(self) -> tuple[type[Exception], ...]:
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import get_session

        transport = type(get_session()).__module__.split(".")[0]  # the client's HTTP library has changed its name before
        return HfHubHTTPError, __import__(transport).HTTPError, OSError, ValueError

    def patiently(self, what: str, action: Callable[[], object], received: Callable[[], int] = lambda: 0, pauses: Sequence[int] | None = None):
        """Runs `action()`, retrying transient failures after each of `pauses` in seconds (PAUSES by default); each retry is a line on standard error.

        `received` counts the bytes that have come: progress begins the pauses anew, so that a flaky line brings a large shard home in any number of
        pieces. Raises UserError with the remedy when the hub means it; an OSError of the local disk is passed on as it is.
        """
        pauses = PAUSES if pauses is None else pauses
        failures, most = 0, received()
        while True:
            try:
                return action()
            except ImportError as error:  # of a proxy that needs a package
                raise UserError(f"{self.source.repository}: {what}: {str(error)[:160]}; check ALL_PROXY and HTTPS_PROXY") from None
            except self._errors() as error:
                if isinstance(error, OSError) and error.errno is not None and not isinstance(
                        error, (ConnectionError, TimeoutError)):
                    raise
                failures, most = (1, received()) if received() > most else (failures + 1, most)
                if failures > len(pauses) or not _is_passing(error):
                    raise _hub_error(self.source, what, error) from None
                pause = max(pauses[failures - 1], _asked_wait(error))
                print(f"{self.source.repository}: {what}: {_words(error)}; trying again in {pause} s ({failures} of {len(pauses)})", file=sys.stderr,
                      flush=True)
                time.sleep(pause)

    def list_files(self) -> list[SourceFile]:
        """All files of the revision with sizes, and sha256 of those that the hub stores as large files."""
        info = self.info("listing its files", self.source.revision)
        if info.sha != self.source.revision:
            raise UserError(f"{self.source.repository}: asked for revision {self.source.revision}, the hub answered with "
                            f"{info.sha}; check source.revision and HF_ENDPOINT")
        files = []
        for entry in sorted(info.siblings, key=lambda sibling: sibling.rfilename):
            name = safe_name(entry.rfilename, self.source.repository)
            if type(entry.size) is not int or entry.size < 0:
                raise UserError(f"{self.source.repository}: the hub gives no size for {name}; it cannot be checked, try "
                                "again later")
            sha256 = entry.lfs.sha256.lower() if entry.lfs and entry.lfs.sha256 else None
            files.append(SourceFile(name, entry.size, sha256, kind_of(name), None if entry.lfs else entry.blob_id))
        return files

    def info(self, what: str, revision: str | None):
        """What the hub says of a revision; UserError for an answer of another form, of a proxy or a login page."""
        try:
            info = self.patiently(what, lambda: self.api.model_info(self.source.repository, revision=revision, files_metadata=True),
                                  pauses=AT_THE_START)
            if not all(isinstance(entry.rfilename, str) for entry in info.siblings):
                raise TypeError("a file has no name")
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{self.source.repository}: {what}: the answer is not that of a hub ({type(error).__name__}: {str(error)[:80]}); check "
                            "HF_ENDPOINT and the proxy") from None
        return info

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.source.repository, name, revision=self.source.revision, endpoint=self.endpoint)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=_token())

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

        return self.patiently(f"reading bytes {begin} to {end} of {name}", once)

    def read_header(self, name: str, size: int) -> Header:
        """Header of a shard, by two range requests."""
        where = f"{self.source.repository}/{name}"
        length = header_length(self.read_range(name, 0, min(FIRST_BYTES, size), size) if size else b"", size, where)
        return parse_header(self.read_range(name, 8, 8 + length, size), size, where)

    def fetch(self, file: SourceFile, target: Path) -> None:
        """Downloads a file to `target`, going on behind what an interrupted run left, and checks size and sha256."""
        from huggingface_hub.file_download import http_get

        check_download(self.source, file.name, file.size)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".incomplete")
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()

        def received() -> int:
            return os.fstat(output.fileno()).st_size

        def once() -> None:
            done = received()
            check_disk(target.parent, file.size - done, file.name)
            if file.size > done:
                http_get(self._url(file.name), output, resume_size=done, headers=self._headers(),
                         expected_size=file.size, displayed_filename=file.name)
            os.fsync(output.fileno())

        with HashedFile(part) as output:
            self.patiently(f"downloading {file.name}", once, received)
            check_bytes(part, output.digest.hexdigest(), file, self.source.repository)
            os.replace(part, target)  # while it is locked
        sync_directory(target.parent)


def check_download(source: SourceSettings, name: str, size: int) -> None:
    """UserError for a file of more bytes than the hub gives by plain HTTP, which can be continued; `hf` has another way to larger ones."""
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    if size > MAX_HTTP_DOWNLOAD_SIZE:
        place = source.repository
        raise UserError(f"{place}: {name} has {human_bytes(size)}, and files over {human_bytes(MAX_HTTP_DOWNLOAD_SIZE)} cannot be downloaded here: "
                        f"run hf download {place} --revision {source.revision} --local-dir DIRECTORY, then convert with source=local "
                        f"source.path=DIRECTORY source.name=ANOTHER source.origin={place}")


def resolve(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """(commit, shards) of a repository's branch, tag or commit; of its main branch if none is given."""
    hub = Hub(SourceSettings(repository=repository, revision=revision))
    info = hub.info("finding its revision", revision)
    names = sorted(sibling.rfilename for sibling in info.siblings)
    shards = [safe_name(name, repository) for name in names if kind_of(name) == "shard"]
    if not shards:
        raise UserError(f"{repository}: no *.safetensors file at its top; name a checkpoint's repository")
    return info.sha, shards


class HashedFile(io.FileIO):
    """An append-only file, whatever position is sought, with the sha256 of all that is in it.

    One process writes it at a time: UserError for a second. What is there is read once; what comes is hashed as far as the system took it, so
    that the hash is right after a failed write, too. Truncating it, as the hub's client does when a server ignores ranges, reads it again.
    """

    def __init__(self, path: Path):
        super().__init__(path, "a+")
        if not lock(self.fileno()) or not is_named(self.fileno(), path):
            self.close()
            raise UserError(f"{path}: another process is downloading this file; wait for it or stop it, then run again")
        self._read_again()

    def _read_again(self) -> None:
        self.digest = hashlib.sha256()
        self.seek(0)
        while chunk := self.read(CHUNK):
            self.digest.update(chunk)

    def write(self, data: bytes) -> int:
        """Appends all of it: a FileIO may take less at a time."""
        rest = memoryview(data)
        while rest:
            count = super().write(rest)
            self.digest.update(rest[:count])
            rest = rest[count:]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Cuts the file off at `size`, or at where it was sought."""
        size = super().truncate(size)
        self._read_again()
        return size


def _git_sha1(path: Path) -> str:
    """git's hash of a file: sha1 of its length and its bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_bytes(path: Path, sha256: str, file: SourceFile, where: str) -> None:
    """Size and, where known, sha256 of a downloaded file, whose bytes have this one; a wrong one is deleted and refused."""
    found = path.stat().st_size
    with open(path, "rb") as opened:
        head = opened.read(len(LFS_POINTER))
    what = None
    if head == LFS_POINTER and file.kind == "shard":
        what = "is a Git LFS pointer, not the data"
    elif found != file.size:
        what = f"has {found} bytes, the hub listed {file.size}"
    elif file.git_sha1 and file.kind != "shard" and _git_sha1(path) != file.git_sha1.lower():
        what = "is not what git's hash of it says"
    elif file.sha256 and sha256 != file.sha256:
        what = f"has sha256 {sha256[:12]}..., the hub listed {file.sha256[:12]}..."
    if what:
        path.unlink()
        raise UserError(f"{where}: {file.name} {what}; the download was deleted, run again")
