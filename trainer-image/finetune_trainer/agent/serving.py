"""The agent's HTTP server: progress for the operator, metrics for Prometheus, the start for the gang's other nodes."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard

# A client that stops in the middle of a request must not hold a thread for ever.
_REQUEST_SECONDS = 10.0


class StartBoard:
    """What the other nodes have to restore, once node 0 has decided it."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        """{attempt, checkpoint}: checkpoint is a store reference, or null for a fresh start; None: not decided."""


class AgentServer:
    """Serves /progress, /metrics, /healthz and /start until the process ends."""

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
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/progress, /metrics, /healthz or /start\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests come every few seconds and tell nothing: they stay out of the log."""
