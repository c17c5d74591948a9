"""Names, labels and owners of children."""

from __future__ import annotations

from typing import Any

from finetune_api import naming
from finetune_api.job import API_VERSION
from finetune_operator.snapshot import JobView

Manifest = dict[str, Any]


def labels(job: JobView, role: str, number: int, pool: str | None = None) -> dict[str, str]:
    """Labels of every child and pod. `number` is the attempt, or the generation that a preflight checks."""
    found = {
        **naming.MANAGED_BY,
        "app.kubernetes.io/name": f"finetune-{role}",
        "app.kubernetes.io/part-of": "finetune",
        naming.LABEL_JOB: job.name,
        naming.LABEL_JOB_UID: job.uid,
        naming.LABEL_ROLE: role,
        naming.LABEL_ATTEMPT: str(number),
    }
    if pool is not None:
        found[naming.LABEL_POOL] = pool
    return found


def owned_by_job(job: JobView) -> list[Manifest]:
    """The FineTuneJob as controller: what it owns goes when it goes."""
    return [_controller(API_VERSION, "FineTuneJob", job.name, job.uid)]


def owned_by_attempt(name: str, uid: str) -> list[Manifest]:
    """A batch Job as controller."""
    return [_controller("batch/v1", "Job", name, uid)]


def _controller(api_version: str, kind: str, name: str, uid: str) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
