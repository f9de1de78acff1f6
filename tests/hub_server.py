"""A model hub on loopback that the real huggingface_hub client talks to, with faults to switch on.

It serves one directory as one repository at one revision: the model-info API with sizes and sha256, HEAD and GET of files
with ranges. It counts the body bytes that it sent for each file, so that a test can say how much was downloaded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1 << 30  # bytes from which a file is served from the disk, with a made-up hash


class Large:
    """A file of any size that is sliced like bytes."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __getitem__(self, part: slice) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(part.start)
            return file.read(part.stop - part.start)


class HubServer:
    """`with HubServer(directory, "owner/name", revision) as hub:` then `hub.endpoint`. Faults are plain attributes."""

    def __init__(self, directory: Path, repository: str, revision: str):
        self.directory, self.repository, self.revision = Path(directory), repository, revision
        self._files: dict[tuple[str, int, int], tuple[bytes, str]] = {}
        self.sent: Counter[str] = Counter()  # body bytes by file
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.token: str | None = None  # demand it, answer 401 without
        self.gated = False  # answer 403 to everybody
        self.unavailable = 0  # refuse so many requests whose path holds `unavailable_path` ...
        self.unavailable_path = ""
        self.unavailable_status, self.retry_after = 503, None  # ... like this
        self.drop_after: int | None = None  # cut the next file's body there, once
        self.drop_always = False  # ... or every body
        self.stall_after: int | None = None  # send so much of a file's body, then nothing until `go_on` is set
        self.go_on = threading.Event()
        self.ignore_range = False
        self.wrong_range = False  # answer a range request with the bytes of another range
        self.storage: str | None = None  # send file requests on to this endpoint, as the hub does for large files
        self.refuse_tokens = False  # be such a storage, which must never see the hub's token
        self.answered_revision = revision  # what the model-info API says that it answered for
        self.corrupt: str | None = None  # flip a byte in the middle of this file

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer on a kept connection waits 40 ms for an acknowledgement

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub._answer(self, body=False)

            def do_GET(self):
                hub._answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def _api(self) -> str:
        return f"/api/models/{self.repository}"

    @property
    def _resolve(self) -> str:
        return f"/{self.repository}/resolve/"

    def _names(self) -> list[str]:
        return sorted(p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*") if p.is_file())

    def _file(self, name: str) -> tuple[bytes, str]:
        """Bytes and sha256 of a file; kept, because hashing 20 MB for every request is what a test would wait for."""
        status = (self.directory / name).stat()
        key = (name, status.st_mtime_ns, status.st_size)
        if status.st_size >= LARGE:
            return Large(self.directory / name), hashlib.sha256(name.encode()).hexdigest()
        if key not in self._files:
            data = (self.directory / name).read_bytes()
            self._files[key] = data, hashlib.sha256(data).hexdigest()
        return self._files[key]

    def _info(self) -> dict:
        siblings = []
        for name in self._names():
            data, sha256 = self._file(name)
            entry = {"rfilename": name, "size": len(data), "blobId": sha256[:40]}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(entry)
        return {"_id": "1", "id": self.repository, "modelId": self.repository, "sha": self.answered_revision,
                "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": siblings}

    def _error(self, handler, status: int, code: str, message: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("X-Error-Message", message)
        if status == self.unavailable_status and self.retry_after is not None:
            handler.send_header("Retry-After", str(self.retry_after))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _refusal(self, path: str, authorization: str | None) -> tuple[int, str, str] | None:
        """(status, code, message) of what this hub does not answer with data."""
        if self.unavailable and self.unavailable_path in path:
            self.unavailable -= 1
            return self.unavailable_status, "Unavailable", "try again"
        if self.refuse_tokens and authorization:
            return 400, "InvalidArgument", "a token was sent to the storage"
        if self.token and authorization != f"Bearer {self.token}":
            return 401, "RepoNotFound", "Invalid credentials"
        if self.gated:
            return 403, "GatedRepo", "Access to this model is restricted"
        if path.startswith(self._api):
            known = path in (self._api, f"{self._api}/revision/main", f"{self._api}/revision/{self.revision}")
            return None if known else (404, "RevisionNotFound", "Invalid rev id")
        if not path.startswith(self._resolve):
            return 404, "RepoNotFound", "Repository not found"
        revision, _, name = path.removeprefix(self._resolve).partition("/")
        if revision != self.revision:
            return 404, "RevisionNotFound", "Invalid rev id"
        return None if (self.directory / name).is_file() else (404, "EntryNotFound", "Entry not found")

    def _answer(self, handler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        if refusal := self._refusal(path, handler.headers.get("Authorization")):
            self._error(handler, *refusal)
        elif path.startswith(self._api):
            data = json.dumps(self._info()).encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            if body:
                handler.wfile.write(data)
        elif self.storage:
            handler.send_response(302)
            handler.send_header("Location", self.storage + handler.path)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        else:
            self._answer_with_file(handler, path.removeprefix(self._resolve).partition("/")[2], body)

    def _answer_with_file(self, handler, name: str, body: bool) -> None:
        data, sha256 = self._file(name)
        if self.corrupt == name:
            data = data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1:]
        asked = handler.headers.get("Range")
        self.requests.append((handler.command, name, asked))
        begin, end = 0, len(data)
        if asked and not self.ignore_range:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            if self.wrong_range:
                begin, end = begin + 1, min(end + 1, len(data))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(end - begin))
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("ETag", f'"{sha256}"')
        handler.send_header("X-Repo-Commit", self.revision)
        handler.end_headers()
        if body:
            self._send(handler, name, data, begin, end)

    def _send(self, handler, name: str, data: bytes | Large, begin: int, end: int) -> None:
        """Sends a file's bytes begin..end, or what the faults leave of them, and counts them."""
        if self.drop_after is not None and end - begin > self.drop_after:
            end, self.drop_after = begin + self.drop_after, self.drop_after if self.drop_always else None
            handler.close_connection = True
        stall = None if self.stall_after is None else begin + self.stall_after
        try:
            for position in range(begin, end, 1 << 16):
                if stall is not None and position >= stall:
                    self.go_on.wait(30)
                piece = data[position:min(position + (1 << 16), end)]
                handler.wfile.write(piece)
                self.sent[name] += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
