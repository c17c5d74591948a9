"""How the other nodes of a gang learn from node 0 what to restore."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_trainer.store.documents import CheckpointRef

_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 5.0
_MAX_BYTES = 64 * 1024


def start_document(attempt: int, ref: CheckpointRef | None) -> dict[str, Any]:
    """What node 0 serves at /start once it has taken the fence."""
    return {"attempt": attempt, "checkpoint": json.loads(ref.to_bytes()) if ref else None}


def ask_node_0(
    host: str, port: int, attempt: int, *, wait_seconds: float, clock: Callable[[], float] = time.monotonic
) -> CheckpointRef | None:
    """The checkpoint that node 0 resumes from; None on a fresh start.

    A node takes part only in the attempt that it was made for. Raises FinetuneError(CollectiveFailed) if node 0 does
    not say it within wait_seconds.
    """
    deadline = clock() + wait_seconds
    while True:
        document, trouble = _ask(host, port)
        if document is not None and document.get("attempt") == attempt:
            found = document.get("checkpoint")
            return CheckpointRef.parse(json.dumps(found).encode(), f"{host}:{port}/start") if found else None
        if clock() >= deadline:
            raise FinetuneError(
                f"node 0 ({host}:{port}) did not start attempt {attempt} within {wait_seconds:g} s: {trouble}. "
                "Look at the log of the pod with index 0.",
                failure_class="CollectiveFailed",
            )
        time.sleep(_POLL_SECONDS)


def _ask(host: str, port: int) -> tuple[dict[str, Any] | None, str]:
    connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request("GET", "/start")
        answer = connection.getresponse()
        body = answer.read(_MAX_BYTES)
        if answer.status != http.client.OK:
            return None, f"it answers {answer.status}"
        document = json.loads(body)
        return (document, "it runs another attempt") if isinstance(document, dict) else (None, "it answers nonsense")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        connection.close()
