"""How the other nodes of a gang talk with node 0: what to restore, which checkpoint to store, how they ended."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import TABLE, FinetuneError
from finetune_api.guards import GuardState
from finetune_trainer.agent.ending import SUCCEEDED, End, read_alarm
from finetune_trainer.store.documents import CheckpointRef

_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 5.0
MAX_BYTES = 64 * 1024
"""More than any of the documents that nodes exchange."""


@dataclass(frozen=True)
class Started:
    """What node 0 decided for the whole gang. ref: the checkpoint to go on from; None on a fresh start."""

    ref: CheckpointRef | None
    fence: int
    guards: GuardState


def start_document(attempt: int, ref: CheckpointRef | None, fence: int, guards: GuardState) -> dict[str, Any]:
    """What node 0 serves at /start once it has taken the fence."""
    return {
        "attempt": attempt,
        "checkpoint": json.loads(ref.to_bytes()) if ref else None,
        "fence": fence,
        "guards": guards.to_json(),
    }


def ask_node_0(
    host: str, port: int, attempt: int, *, wait_seconds: float, clock: Callable[[], float] = time.monotonic
) -> Started:
    """What node 0 decided for this attempt.

    A node takes part only in the attempt that it was made for. Raises FinetuneError(CollectiveFailed) if node 0 does
    not say it within wait_seconds.
    """
    deadline = clock() + wait_seconds
    while True:
        document, trouble = ask(host, port, "/start")
        if document is not None and document.get("attempt") == attempt:
            return _started(document, f"{host}:{port}/start")
        if clock() >= deadline:
            raise FinetuneError(
                f"node 0 ({host}:{port}) did not start attempt {attempt} within {wait_seconds:g} s: "
                f"{trouble or 'it runs another attempt'}. Look at the log of the pod with index 0.",
                failure_class="CollectiveFailed",
            )
        time.sleep(_POLL_SECONDS)


def _started(document: dict[str, Any], where: str) -> Started:
    found = document.get("checkpoint")
    try:
        return Started(
            CheckpointRef.parse(json.dumps(found).encode(), where) if found else None,
            int(document["fence"]),
            GuardState.from_json(document["guards"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FinetuneError(
            f"{where} answers what this release does not read ({type(error).__name__}). All nodes have to run one image.",
            failure_class="Internal",
        ) from None


def tell_node_0(host: str, port: int, *, attempt: int, node: int, end: End) -> None:
    """Node 0 knows how this node ended, if it can be reached: it may see of it only that a rank is gone."""
    told = {"attempt": attempt, "node": node, "outcome": end.outcome, "message": end.message, "field": end.field}
    if end.alarm is not None:
        told |= {"onsetStep": end.alarm.onset_step, "reason": end.alarm.reason}
    _exchange(host, port, "POST", "/ended", json.dumps(told).encode())


def read_end(body: bytes) -> tuple[int, int, End] | None:
    """Attempt, node and end as `tell_node_0` sends them; None if the body is something else."""
    try:
        told = json.loads(body)
        attempt, node, outcome, message, place = (
            told[name] for name in ("attempt", "node", "outcome", "message", "field")
        )
    except (ValueError, KeyError, TypeError):
        return None
    known = outcome in TABLE or outcome == SUCCEEDED
    if not (known and isinstance(attempt, int) and isinstance(node, int) and isinstance(message, str)):
        return None
    return attempt, node, End(outcome, message, place if isinstance(place, str) else None, read_alarm(told))


def ask(host: str, port: int, path: str) -> tuple[dict[str, Any] | None, str]:
    """The JSON object that an agent serves at path, or None and what went wrong."""
    return _exchange(host, port, "GET", path)


def _exchange(
    host: str, port: int, method: str, path: str, content: bytes | None = None
) -> tuple[dict[str, Any] | None, str]:
    connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request(method, path, content)
        answer = connection.getresponse()
        body = answer.read(MAX_BYTES)
        if answer.status != http.client.OK:
            return None, f"it answers {answer.status}"
        document = json.loads(body)
        return (document, "") if isinstance(document, dict) else (None, "it answers nonsense")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        connection.close()
