"""Whom to ask: what the watches have told about jobs, their attempts' Jobs and pods, joined by UID. Plain state.

Only UIDs and controller owner references join, never names or labels: a pod that merely looks like ours is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api import naming
from finetune_api.status import Progress

Body = Mapping[str, Any]
_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, slots=True)
class _Job:
    namespace: str
    name: str
    uid: str
    resource_version: str
    attempt: int | None
    current_uid: str | None
    total_steps: int
    planned_batch: tuple[int, int] | None
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class _Attempt:
    owner: str | None
    number: int | None


@dataclass(frozen=True, slots=True)
class _Pod:
    owner: str | None
    first: bool
    address: str
    running: bool
    deleting: bool
    termination: str | None


@dataclass(frozen=True, slots=True)
class Target:
    """A pod 0 of the newest attempt of a job, and the status that stands.

    termination: what its container left, once it has ended; until then it can be asked at `address`.
    planned_batch: micro batch and accumulation.
    shown: status.progress, if it is about this attempt.
    """

    namespace: str
    name: str
    uid: str
    resource_version: str
    attempt: int
    address: str
    termination: str | None
    total_steps: int
    planned_batch: tuple[int, int] | None
    shown: Progress | None


class Sightings:
    """The newest sight of each object that concerns progress."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._attempts: dict[str, _Attempt] = {}
        self._pods: dict[str, _Pod] = {}

    def saw_job(self, body: Body) -> list[str]:
        """A FineTuneJob as it is now; returns the UIDs of pods that can be asked since."""
        after = _job(body)
        before = self._jobs.get(after.uid)
        self._jobs[after.uid] = after
        if before and (before.attempt, before.current_uid) == (after.attempt, after.current_uid):
            return []
        attempts = {uid for uid, attempt in self._attempts.items() if attempt.owner == after.uid}
        return [uid for uid, pod in self._pods.items() if pod.first and pod.owner in attempts]

    def saw_attempt(self, body: Body) -> list[str]:
        """A batch Job as it is now; returns the UIDs of pods that can be asked since."""
        meta = body["metadata"]
        uid, number = meta["uid"], (meta.get("labels") or {}).get(naming.LABEL_ATTEMPT, "")
        after = _Attempt(_controller(body), int(number) if number.isdecimal() else None)
        if self._attempts.get(uid) == after:
            return []
        self._attempts[uid] = after
        return [pod_uid for pod_uid, pod in self._pods.items() if pod.first and pod.owner == uid]

    def saw_pod(self, body: Body) -> list[str]:
        """A pod as it is now; returns its UID if it has begun, is about to stop or has ended since the last sight."""
        uid, after = body["metadata"]["uid"], _pod(body)
        before = self._pods.get(uid)
        self._pods[uid] = after
        began = after.running and not (before and before.running)
        stopping = after.running and after.deleting and not (before and before.deleting)
        ended = after.termination is not None and not (before and before.termination is not None)
        return [uid] if after.first and (began or stopping or ended) else []

    def known(self) -> frozenset[str]:
        """UIDs of everything that is remembered."""
        return frozenset({*self._jobs, *self._attempts, *self._pods})

    def forget(self, uid: str) -> None:
        """Nothing is known of that object any more."""
        self._jobs.pop(uid, None)
        self._attempts.pop(uid, None)
        self._pods.pop(uid, None)

    def target(self, pod_uid: str) -> Target | None:
        """The pod with its job and attempt; None unless all three are known, ours, and the newest attempt."""
        pod = self._pods.get(pod_uid)
        attempt = self._attempts.get(pod.owner or "") if pod else None
        job = self._jobs.get(attempt.owner or "") if attempt else None
        if pod is None or attempt is None or job is None or not pod.first:
            return None
        if attempt.number is None or attempt.number != job.attempt:
            return None
        if job.current_uid is not None and job.current_uid != pod.owner:
            return None
        if pod.termination is None and not (pod.running and pod.address):
            return None
        shown = job.progress if job.progress and job.progress.attempt == attempt.number else None
        return Target(
            job.namespace,
            job.name,
            job.uid,
            job.resource_version,
            attempt.number,
            pod.address,
            pod.termination,
            job.total_steps,
            job.planned_batch,
            shown,
        )


def _controller(body: Body) -> str | None:
    owners = body["metadata"].get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def _job(body: Body) -> _Job:
    meta, status = body["metadata"], body.get("status") or {}
    try:
        progress = Progress.from_json(dict(status["progress"])) if "progress" in status else None
    except ValidationError:
        progress = None  # written by hand or by another release: replaced by the next poll
    current, plan = status.get("current") or {}, status.get("plan") or {}
    return _Job(
        meta["namespace"],
        meta["name"],
        meta["uid"],
        meta["resourceVersion"],
        status.get("attempt"),
        current.get("jobUID"),
        plan.get("totalSteps") or 0,
        (plan.get("microBatchSize") or 1, plan.get("gradientAccumulation") or 1) if plan else None,
        progress,
    )


def _pod(body: Body) -> _Pod:
    meta, status = body["metadata"], body.get("status") or {}
    containers = status.get("containerStatuses") or []
    state = next((c.get("state") or {} for c in containers if c.get("name") == naming.TRAINER_CONTAINER), {})
    ended = state.get("terminated")
    return _Pod(
        owner=_controller(body),
        first=(meta.get("labels") or {}).get(_INDEX) == "0",
        address=status.get("podIP") or "",
        running="running" in state and status.get("phase") == "Running",
        deleting=meta.get("deletionTimestamp") is not None,
        termination=(ended.get("message") or "") if ended else None,
    )
