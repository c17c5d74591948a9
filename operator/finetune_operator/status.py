"""Writes status: one server-side apply, with the version that was read, and only when something changed."""

from __future__ import annotations

from typing import Any

from finetune_api.job import API_VERSION
from finetune_api.status import FineTuneJobStatus
from finetune_operator.kube import Kube
from finetune_operator.snapshot import JobView


def owned(status: FineTuneJobStatus) -> dict[str, Any]:
    """The part of status that this writer owns: all but `progress`, which the poller alone writes."""
    return status.model_copy(update={"progress": None}).to_json()


async def write_status(kube: Kube, job: JobView, status: FineTuneJobStatus) -> bool:
    """Whether status had to be written; raises Conflict where the job changed since it was read."""
    wanted = owned(status)
    if wanted == owned(job.status):
        return False
    await kube.apply_status(
        {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "metadata": {
                "name": job.name,
                "namespace": job.namespace,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "status": wanted,
        }
    )
    return True
