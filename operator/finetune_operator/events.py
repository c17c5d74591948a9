"""Posts events about a FineTuneJob. An event that cannot be posted is logged and forgotten: conditions are the truth."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import structlog

from finetune_api import naming
from finetune_api.job import API_VERSION
from finetune_operator.actions import Event
from finetune_operator.clock import format_time
from finetune_operator.kube import ApiError, Kube
from finetune_operator.snapshot import JobView

log = structlog.get_logger()


async def publish(kube: Kube, job: JobView, events: Sequence[Event], now: datetime, reporter: str) -> None:
    """Posts each event once."""
    for event in events:
        try:
            await kube.create(_body(job, event, format_time(now), reporter))
        except ApiError as error:
            log.warning("event_not_posted", job=job.key, reason=event.reason, error=str(error))


def _body(job: JobView, event: Event, now: str, reporter: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{job.name}.", "namespace": job.namespace, "labels": dict(naming.MANAGED_BY)},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": naming.MANAGER_OPERATOR},
        "reportingComponent": naming.MANAGER_OPERATOR,
        "reportingInstance": reporter,
    }
