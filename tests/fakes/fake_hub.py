"""The hub on loopback: its API, its files and its faults, as huggingface_hub 2.4 meets them.

    /api/models/{id}[/revision/{rev}]      commit, siblings with sizes and LFS hashes
    /{id}/resolve/{rev}/{file}             small files; large ones (LFS) redirect to
    /cdn/{sha256}                          their bytes, with ranges

`python fake_hub.py FOLDER` serves the files of a folder as `org/name`, to try things by hand.
"""

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 20


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """One model: its files at each commit, and what its branches and tags mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files on top of the branch; returns its hash."""
        before = self.commits.get(self.refs.get(branch, ""), {})
        sha = hashlib.sha1(repr((sorted({**before, **files}), len(self.commits))).encode())
        self.commits[sha.hexdigest()] = {**before, **files}
        self.refs[branch] = sha.hexdigest()
        return sha.hexdigest()


@dataclass
class Faults:
    """What goes wrong; counters go down with each use."""

    busy: int = 0  # requests that get 503
    busy_cdn: int = 0  # the same, for the bytes of large files only
    cut_after: int | None = None  # bytes after which a large file's connection breaks
    cuts: int = 0  # how often
    stall_after: int | None = None  # bytes after which a large file's bytes stop coming
    corrupt: bool = False  # large files come with one wrong byte
    no_ranges: bool = False  # ranges are ignored: 200 and everything


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int
    range: str
    token: str


class FakeHub:
    """The server's state: repositories, faults, accounts, and the log of all requests."""

    def __init__(self, lfs_from: int = 1 << 16) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.accounts: dict[str, set[str]] = {}  # token -> gated and private models it may read
        self.log: list[Request] = []
        self.released = threading.Event()  # ends a stall
        self.lfs_from = lfs_from
        self.url = ""

    def add(self, model_id: str, files: Mapping[str, bytes]) -> Repository:
        repository = self.repositories.setdefault(model_id, Repository())
        repository.commit(files)
        return repository

    def requests(self, part: str = "") -> list[Request]:
        """What was asked for, of paths that contain `part`."""
        return [request for request in self.log if part in request.path]

    def blob(self, sha256: str) -> bytes | None:
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return content
        return None

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Listen on a free port of loopback; yields the address for HF_ENDPOINT."""
        hub = self

        class Handler(_Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self.url
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub
    _status = 0

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to `FakeHub.log`, not to stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.state, urlsplit(self.path).path
        is_cdn = path.startswith("/cdn/")
        if hub.faults.busy > 0 or (is_cdn and hub.faults.busy_cdn > 0):
            if is_cdn and hub.faults.busy_cdn > 0:
                hub.faults.busy_cdn -= 1
            else:
                hub.faults.busy -= 1
            self._answer(503, b"try later")
        elif is_cdn:
            self._cdn(path.removeprefix("/cdn/"))
        elif found := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
            self._info(found[1], unquote(found[2] or "main"))
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self._answer(404, b"no such page")

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _open(self, model_id: str, *, reads_files: bool) -> Repository | None:
        """The repository, if this caller may see it; else the refusal has been sent."""
        hub, token = self.state, self._token()
        if token and token not in hub.accounts:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        repository, rights = hub.repositories.get(model_id), hub.accounts.get(token, set())
        if repository is None or (repository.is_private and model_id not in rights):
            status = 404 if token else 401
            self._refuse(status, "RepoNotFound", "Repository not found")
            return None
        if reads_files and repository.is_gated and model_id not in rights:
            self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
            return None
        return repository

    def _commit(self, repository: Repository, revision: str) -> str | None:
        sha = repository.refs.get(revision, revision)
        if sha in repository.commits:
            return sha
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _info(self, model_id: str, revision: str) -> None:
        # The real hub tells anybody the names of a gated model's files; the bytes it refuses.
        repository = self._open(model_id, reads_files=False)
        if repository is None or (sha := self._commit(repository, revision)) is None:
            return
        siblings = []
        for name, content in repository.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs=" in self.path:
                entry |= {"size": len(content), "blobId": git_hash(content)}
                if self._is_large(content):
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(entry)
        body = {"id": model_id, "sha": sha, "siblings": siblings, "gated": repository.is_gated}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _is_large(self, content: bytes) -> bool:
        return len(content) >= self.state.lfs_from

    def _resolve(self, model_id: str, revision: str, name: str) -> None:
        repository = self._open(model_id, reads_files=True)
        if repository is None or (sha := self._commit(repository, revision)) is None:
            return
        content = repository.commits[sha].get(name)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha}
        if self._is_large(content):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            # Another name for the same machine is another origin: no token may come along.
            cdn = self.state.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", {**headers, "Location": f"{cdn}/cdn/{sha256}"})
        else:
            self._answer(200, content, {**headers, "ETag": f'"{git_hash(content)}"'})

    def _cdn(self, sha256: str) -> None:
        content, faults = self.state.blob(sha256), self.state.faults
        if content is None:
            self._answer(404, b"")
            return
        if faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if found and not faults.no_ranges:
            start, total = int(found[1]), len(content)
            headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
            self._answer(206, content[start:], headers, is_large=True)
        else:
            self._answer(200, content, is_large=True)

    def _refuse(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        more = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._answer(status, body, {**more, "X-Error-Message": message, **(headers or {})})

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        is_large: bool = False,
    ) -> None:
        asked = Request(
            self.command, self.path, status, self.headers.get("Range") or "", self._token()
        )
        self.state.log.append(asked)
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_large:
            self._pour(body)
        else:
            self.wfile.write(body)

    def _pour(self, body: bytes) -> None:
        faults, sent = self.state.faults, 0
        try:
            for start in range(0, len(body), CHUNK):
                if faults.stall_after is not None and sent >= faults.stall_after:
                    self.wfile.flush()
                    self.state.released.wait()
                if faults.cuts > 0 and faults.cut_after is not None and sent >= faults.cut_after:
                    faults.cuts -= 1
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.wfile.write(body[start : start + CHUNK])
                sent += len(body[start : start + CHUNK])
        except OSError:  # the client has been killed
            self.close_connection = True


def main(folder: Path) -> None:
    """Serve a folder until Ctrl-C."""
    hub = FakeHub()
    hub.add("org/name", {path.name: path.read_bytes() for path in folder.iterdir()})
    with hub.serve() as url:
        sys.stdout.write(f"HF_ENDPOINT={url} text-generation-launcher --model-id org/name\n")
        sys.stdout.flush()
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
