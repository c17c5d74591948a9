"""From API objects to the frozen values of a snapshot. Pure: `watch` uses it to see what changed, `observe` to observe."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api import naming
from finetune_api.job import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.clock import parse_time
from finetune_operator.snapshot import ChildJob, JobView, PodView

Body = Mapping[str, Any]
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
OUR_CONTAINERS = (naming.TRAINER_CONTAINER, naming.PREFLIGHT_CONTAINER)


def controller_uid(body: Body) -> str | None:
    """UID of the object's controller."""
    for owner in body["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            return str(owner["uid"])
    return None


def job_view(body: Body) -> JobView:
    """The FineTuneJob; a spec that this release cannot read becomes `spec_error`."""
    metadata = body["metadata"]
    spec: FineTuneJobSpec | None = None
    problem: tuple[str, str] | None = None
    try:
        spec = FineTuneJobSpec.from_json(body.get("spec") or {})
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        problem = (f"spec.{path}" if path else "spec", str(first["msg"]))
    return JobView(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 1)),
        resource_version=metadata["resourceVersion"],
        deleting="deletionTimestamp" in metadata,
        spec=spec,
        status=FineTuneJobStatus.from_json(body.get("status") or {}),
        spec_error=problem,
    )


def child_job(body: Body) -> ChildJob | None:
    """The batch Job; None where its labels are not those of a child of ours."""
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    role = labels.get(naming.LABEL_ROLE)
    number = _number(labels.get(naming.LABEL_ATTEMPT))
    if role not in (naming.ROLE_PREFLIGHT, naming.ROLE_TRAINER) or number is None:
        return None
    status = body.get("status") or {}
    end: Body = next(
        (c for c in status.get("conditions") or () if c["type"] in ("Complete", "Failed") and c["status"] == "True"),
        {},
    )
    return ChildJob(
        name=metadata["name"],
        uid=metadata["uid"],
        role=role,
        number=number,
        created=parse_time(metadata["creationTimestamp"]),
        started=parse_time(status["startTime"]) if status.get("startTime") else None,
        deleting="deletionTimestamp" in metadata,
        suspended=bool((body.get("spec") or {}).get("suspend")),
        finished=end.get("type"),
        reason=end.get("reason") or "",
        message=end.get("message") or "",
    )


def pod_view(body: Body) -> PodView:
    """The pod, as far as decisions need it."""
    metadata = body["metadata"]
    status = body.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    disruption = conditions.get("DisruptionTarget") or {}
    state = _container_state(status)
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or {}
    deletion = metadata.get("deletionTimestamp")
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        job_uid=controller_uid(body) or "",
        role=(metadata.get("labels") or {}).get(naming.LABEL_ROLE) or "",
        index=_number((metadata.get("labels") or {}).get(COMPLETION_INDEX)) or 0,
        phase=status.get("phase") or "Pending",
        created=parse_time(metadata["creationTimestamp"]),
        node=(body.get("spec") or {}).get("nodeName"),
        scheduled=_time(scheduled.get("lastTransitionTime") if scheduled.get("status") == "True" else None),
        started=_time(ended.get("startedAt") or (state.get("running") or {}).get("startedAt")),
        deletion_time=_time(deletion),
        unschedulable=(
            scheduled.get("message") or "no node has room"
            if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
            else ""
        ),
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        ended=bool(ended),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason") or "",
        exit_time=_time(ended.get("finishedAt")),
        termination_message=ended.get("message") or "",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        disruption=(disruption.get("reason") or "Disruption") if disruption.get("status") == "True" else None,
    )


def _container_state(status: Body) -> Body:
    for container in status.get("containerStatuses") or ():
        if container.get("name") in OUR_CONTAINERS:
            state: Body = container.get("state") or {}
            return state
    return {}


def _time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None
