"""A small HTTP server with the contract of a model hub, for HF_ENDPOINT. Checked with the hub's own client.

Repositories are plain dictionaries of files; `main` and the commit are their revisions.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from tests.train.sources.hub_writing import answer_write

LARGE_BYTES = 4096
"""Files from this size on are told of as large files, with a SHA-256."""


@dataclass
class Repository:
    """One repository. token: needed to see it at all; gated: its files need access that nobody was granted.

    private: as the hub tells of it.
    """

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        """40 hex digits that change with the content."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name])
        return digest.hexdigest()


@dataclass
class HubServer:
    """A hub on a free loopback port. repositories: `owner/name` for models, `datasets/owner/name` for data sets.

    accounts: token → what the hub says of its owner, as `account` makes it.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    accounts: dict[str, dict[str, object]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_next: int = 0
    """How many of the next requests are answered 503."""
    write_token: str | None = None
    """Who may create repositories and commit to them; None: nobody."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded large files by their SHA-256."""

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_POST(self) -> None:
                hub._write(self)

            def do_PUT(self) -> None:
                hub._write(self)

            def log_message(self, format: str, *arguments: object) -> None:
                hub.requests.append(format % arguments)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _write(self, request: BaseHTTPRequestHandler) -> None:
        if self.fail_next > 0:
            self.fail_next -= 1
            request.close_connection = True  # its body was not read
            return _send(request, 503, {}, b"busy", True)
        status, answer = answer_write(self, request, unquote(urlsplit(request.path).path))
        _send(request, status, {"Content-Type": "application/json"}, json.dumps(answer).encode(), True)

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        if self.fail_next > 0:
            self.fail_next -= 1
            return _send(request, 503, {}, b"busy", body)
        path = unquote(urlsplit(request.path).path)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if path == "/api/whoami-v2":
            return _whoami(request, self.accounts.get(given), body)
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            kind, name, what, revision, below = match.groups()
            what, revision = what or "revision", revision or "main"
            key = f"datasets/{name}" if kind == "datasets" else name
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            key, revision, below = match.groups()
            what = "resolve"
        else:
            return _send(request, 404, {}, b"no such page", body)
        repository = self.repositories.get(key)
        if repository is None or (repository.token and given != repository.token):
            if given and repository is not None:
                return _refuse(request, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, body)
            return _refuse(request, 401, {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in ("main", repository.commit):
            return _refuse(request, 404, {"X-Error-Code": "RevisionNotFound"}, body)
        if what == "resolve":
            return _resolve(request, repository, below, body)
        document = _info(key, repository) if what == "revision" else _tree(repository, below or "")
        _send(request, 200, {"Content-Type": "application/json"}, json.dumps(document).encode(), body)


def account(
    name: str, *, orgs: dict[str, str] | None = None, role: str = "write", scoped: list[object] | None = None
) -> dict[str, object]:
    """A user as /api/whoami-v2 tells of one. orgs: organisation → role in it; role, scoped: of the token."""
    access: dict[str, object] = {"displayName": "t", "role": role}
    if scoped is not None:
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    groups = [{"type": "org", "name": org, "roleInOrg": own} for org, own in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": groups, "auth": {"type": "access_token", "accessToken": access}}


def _whoami(request: BaseHTTPRequestHandler, found: dict[str, object] | None, body: bool) -> None:
    if found is None:
        return _refuse(request, 401, {"X-Error-Message": "Invalid username or password."}, body)
    _send(request, 200, {"Content-Type": "application/json"}, json.dumps(found).encode(), body)


def _info(key: str, repository: Repository) -> dict[str, object]:
    siblings = []
    for name, data in sorted(repository.files.items()):
        entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
        if len(data) >= LARGE_BYTES:
            entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
        siblings.append(entry)
    return {
        "id": key.removeprefix("datasets/"),
        "sha": repository.commit,
        "siblings": siblings,
        "private": repository.private,
        "downloads": 0,
        "likes": 0,
        "tags": [],
    }


def _tree(repository: Repository, below: str) -> list[dict[str, object]]:
    folder = f"{below.rstrip('/')}/" if below else ""
    return [
        {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
        for name, data in sorted(repository.files.items())
        if name.startswith(folder)
    ]


def _resolve(request: BaseHTTPRequestHandler, repository: Repository, name: str, body: bool) -> None:
    if repository.gated:
        return _refuse(request, 403, {"X-Error-Code": "GatedRepo"}, body)
    data = repository.files.get(name)
    commit = {"X-Repo-Commit": repository.commit}
    if data is None:
        return _refuse(request, 404, commit | {"X-Error-Code": "EntryNotFound"}, body)
    etag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE_BYTES else _blob(data)
    headers = commit | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return _send(request, 206, headers, data[start : end + 1], body)
    _send(request, 200, headers, data, body)


def _refuse(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bool) -> None:
    _send(request, status, headers, b'{"error": "refused"}', body)


def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body:
        request.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
