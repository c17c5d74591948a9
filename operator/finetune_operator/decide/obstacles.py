"""Why pods do not run: from container states, the scheduler's words and warning events to a row of the table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune_api.failures import TABLE
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.documents import clean
from finetune_operator.decide.runtime import start_failure
from finetune_operator.snapshot import ChildJob, PodView, Snapshot, WarningEvent

_IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
    "ImageInspectError",
)
_MISSING = re.compile(
    r"(secret|configmap|serviceaccount|service account|persistentvolumeclaim) \"?[^ ]+\"? not found"
    r"|couldn't find key|references non-existent",
    re.IGNORECASE,
)
_KIND = re.compile(r"service ?account|configmap|persistentvolumeclaim|priorityclass", re.IGNORECASE)
_FIELDS = {
    "serviceaccount": "spec.credentials.serviceAccountName",
    "configmap": "spec.storage.caConfigMapName",
    "priorityclass": "spec.priorityClassName",
}


def why_not_running(seen: Snapshot, job: ChildJob, pods: Sequence[PodView], expected: int) -> Cause | None:
    """The most telling reason why the gang is not whole; None where nothing stands in its way yet.

    A cause that time does not mend comes first.
    """
    causes = [found for pod in pods if (found := _in_pod(pod)) is not None]
    missing = len(pods) < expected
    causes += [
        found
        for warning in seen.warnings_about([job.uid, *(pod.uid for pod in pods if pod.phase == "Pending")])
        if (missing or warning.object_uid != job.uid) and (found := _in_warning(warning)) is not None
    ]
    causes += [Cause(item.failure_class, item.message) for item in seen.obstacles if item.name == job.name]
    return min(causes, key=lambda cause: TABLE[cause.failure_class].retriable, default=None)


def refusal(message: str) -> Cause:
    """What the API server's refusal to create a pod or a Job means."""
    text = clean(message)
    if "exceeded quota" in text or "failed quota" in text:
        return Cause("QuotaExceeded", text)
    if "PriorityClass" in text:
        return Cause("InvalidSpec", text, _FIELDS["priorityclass"])
    if _MISSING.search(text):
        return Cause("ReferenceNotFound", text, _field(text))
    return Cause("AdmissionDenied", text)


def _in_pod(pod: PodView) -> Cause | None:
    text = clean(pod.waiting_message)
    if pod.waiting_reason in _IMAGE:
        return Cause("ImagePullFailed", text or pod.waiting_reason)
    if pod.waiting_reason == "CreateContainerConfigError":
        missing = _MISSING.search(text) is not None
        return Cause("ReferenceNotFound" if missing else "AdmissionDenied", text, _field(text) if missing else None)
    if pod.waiting_reason in ("CreateContainerError", "RunContainerError"):
        return start_failure(text or pod.waiting_reason, f"pod {pod.name}", pod.node)
    if pod.unschedulable:
        text = clean(pod.unschedulable)
        if _MISSING.search(text):
            return Cause("ReferenceNotFound", text, _field(text))
        return Cause("Unschedulable", text)
    return None


def _in_warning(warning: WarningEvent) -> Cause | None:
    if warning.reason == "FailedCreate":
        return refusal(warning.message)
    if warning.reason == "FailedMount" and _MISSING.search(warning.message):
        text = clean(warning.message)
        return Cause("ReferenceNotFound", text, _field(text))
    return None


def _field(text: str) -> str | None:
    found = _KIND.search(text)
    if found is None:
        return "spec.credentials.secretName"
    return _FIELDS.get(found.group().lower().replace(" ", ""))
