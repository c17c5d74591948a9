"""The agent's HTTP server: progress for the operator, metrics for Prometheus, the start for the gang's other nodes."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from finetune_trainer.agent import guarding, peers
from finetune_trainer.agent.ending import STOPPED, SUCCEEDED, End
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard

# A client that stops in the middle of a request must not hold a thread for ever.
_REQUEST_SECONDS = 10.0
_LOOK_SECONDS = 0.05
_TELL_SECONDS = 5.0
# What a node ends with because another one did.
_CONSEQUENCES = ("CollectiveFailed", STOPPED, SUCCEEDED)


class StartBoard:
    """What node 0 tells the gang's other nodes, and what it hears from them."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        """See peers.start_document; None: not decided yet."""
        self.storing: int | None = None
        """The step whose checkpoint is stored now: every node stores its part of it."""
        self.stored: int | None = None
        """The newest step that is stored or given up: no node needs its part, or an older one, any more."""
        self.ended: dict[int, End] = {}
        """How the other nodes ended, by their number."""

    def hear(self, body: bytes) -> bool:
        """Take in what a node tells at /ended; False if it is not about this attempt. Its first word counts."""
        found = peers.read_end(body)
        if found is None or self.document is None or found[0] != self.document["attempt"]:
            return False
        self.ended.setdefault(found[1], found[2])
        return True

    def explain(self, end: End) -> End:
        """Node 0's end, or what another node tells of the same: of lost contact and of a hang it may know more.

        The other nodes have some seconds to tell it. What a guard has found wins over a stop: the gang could not go on
        before the stop came, and may have been stopped for that very reason.
        """
        if end.outcome == STOPPED:
            heard = list(self.ended.items())
            return next((_of_node(node, told) for node, told in heard if told.outcome in guarding.ANSWERED), end)
        if end.outcome not in ("CollectiveFailed", "Hang"):
            return end
        deadline = time.monotonic() + _TELL_SECONDS
        while time.monotonic() < deadline:
            for node, told in list(self.ended.items()):
                if told.outcome == "Hang":
                    return End("Hang", f"{end.message} Node {node}: {told.message}")
                if told.outcome not in _CONSEQUENCES:
                    return _of_node(node, told)
            time.sleep(_LOOK_SECONDS)
        return end


def _of_node(node: int, told: End) -> End:
    return replace(told, message=f"node {node}: {told.message}")


class AgentServer:
    """Serves /progress, /metrics, /healthz, and /start, /checkpoint and /ended for the gang, until the process ends."""

    def __init__(self, host: str, port: int, board: ProgressBoard, metrics: Metrics, start: StartBoard) -> None:
        handler = type("Handler", (_Handler,), {"board": board, "metrics": metrics, "start": start})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def run(self) -> None:
        """Answers from now on, in a thread of its own."""
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    board: ProgressBoard
    metrics: Metrics
    start: StartBoard
    timeout = _REQUEST_SECONDS
    server_version = "finetune-agent"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/progress":
            self._answer(HTTPStatus.OK, "application/json", json.dumps(self.board.document.to_json()).encode())
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, self.metrics.render())
        elif path == "/healthz":
            self._answer(HTTPStatus.OK, "text/plain", b"ok\n")
        elif path == "/start" and self.start.document is not None:
            self._answer(HTTPStatus.OK, "application/json", json.dumps(self.start.document).encode())
        elif path == "/start":
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"not decided yet\n")
        elif path == "/checkpoint":
            told = {"attempt": self.board.document.attempt, "storing": self.start.storing, "stored": self.start.stored}
            self._answer(HTTPStatus.OK, "application/json", json.dumps(told).encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/progress, /metrics, /healthz, /start or /checkpoint\n")

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if self.path != "/ended" or not size.isdigit() or int(size) > peers.MAX_BYTES:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"a node's end at /ended\n")
        elif self.start.hear(self.rfile.read(int(size))):
            self._answer(HTTPStatus.OK, "application/json", b"{}")
        else:
            self._answer(HTTPStatus.CONFLICT, "text/plain", b"not of this attempt\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests come every few seconds and tell nothing: they stay out of the log."""
