"""An HTTP proxy in front of the real S3 server that makes chosen requests fail as overloaded servers do."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from enum import Enum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


class Trouble(Enum):
    """How a request fails: an answer with that status and code, or a broken connection."""

    SLOW_DOWN = (503, "SlowDown")
    UNAVAILABLE = (503, "ServiceUnavailable")
    INTERNAL = (500, "InternalError")
    TOO_MANY = (429, "TooManyRequests")
    REQUEST_TIMEOUT = (400, "RequestTimeout")
    RESET = (0, "reset")
    """The connection is reset before the body of the request was read."""
    RESET_ANSWER = (0, "reset in the answer")
    """The server has done it, but half of its answer is missing."""


Choose = Callable[[str, str, int], Trouble | None]
"""Told method, path with query, and how often this request was seen before (0 first)."""


class FaultyProxy:
    """Forwards to the server at target; `choose` says which request fails and how. `failed` counts them."""

    def __init__(self, target: str, choose: Choose) -> None:
        self.choose = choose
        self.failed: Counter[Trouble] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()
        self.target = urlsplit(target).netloc
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next_trouble(self, method: str, path: str) -> Trouble | None:
        """What happens to this request."""
        with self.lock:
            trouble = self.choose(method, path, self.seen[method, path])
            self.seen[method, path] += 1
            if trouble:
                self.failed[trouble] += 1
            return trouble


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _forward(self) -> None:
        trouble = self.server.proxy.next_trouble(self.command, self.path)
        if trouble is Trouble.RESET:
            return self._reset()
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if trouble and trouble is not Trouble.RESET_ANSWER:
            status, code = trouble.value
            return self._answer(status, f"<Error><Code>{code}</Code><Message>busy</Message></Error>".encode(), {})
        upstream = HTTPConnection(self.server.proxy.target, timeout=30)
        # Signed by the name of the proxy, so the headers go on as they are.
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        if trouble is Trouble.RESET_ANSWER:
            self._answer(answer.status, data, kept, cut=True)
            return self._reset()
        self._answer(answer.status, data, kept, length=answer.getheader("Content-Length"))

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False, length: str | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        if not cut:
            self.end_headers()
            self.wfile.write(data)
        elif data:
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward


_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive"}
