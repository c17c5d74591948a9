"""Whom the poller asks: pod 0 of the newest attempt of a job, and only if it is ours by UID."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import naming
from finetune_operator.progress.sightings import Sightings, Target

Body = dict[str, Any]


def job(
    uid: str = "job-uid",
    attempt: int | None = 1,
    current: str | None = "attempt-uid",
    version: str = "7",
    **status: Any,
) -> Body:
    if attempt is not None:
        status["attempt"] = attempt
    if current:
        status["current"] = {"number": attempt, "jobUID": current}
    return {
        "metadata": {"uid": uid, "name": "faq", "namespace": "team-a", "resourceVersion": version},
        "status": {"plan": {"totalSteps": 100}, **status},
    }


def owner(uid: str | None) -> list[Body]:
    return [{"uid": uid, "controller": True}] if uid else []


def attempt(uid: str = "attempt-uid", of: str | None = "job-uid", number: str = "1") -> Body:
    return {"metadata": {"uid": uid, "ownerReferences": owner(of), "labels": {naming.LABEL_ATTEMPT: number}}}


def pod(
    uid: str = "pod-uid",
    of: str | None = "attempt-uid",
    index: str = "0",
    state: str = "running",
    message: str = "",
    deleting: bool = False,
) -> Body:
    labels = {"batch.kubernetes.io/job-completion-index": index}
    meta: Body = {"uid": uid, "ownerReferences": owner(of), "labels": labels}
    if deleting:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    container = {"name": naming.TRAINER_CONTAINER, "state": {state: {"message": message} if message else {}}}
    phase = {"running": "Running", "waiting": "Pending", "terminated": "Failed"}[state]
    return {"metadata": meta, "status": {"phase": phase, "podIP": "127.64.0.9", "containerStatuses": [container]}}


def seen(*bodies: Body) -> Sightings:
    found = Sightings()
    for body, see in zip(bodies, (found.saw_job, found.saw_attempt, found.saw_pod), strict=True):
        see(body)
    return found


def test_pod_0_of_the_newest_attempt_is_asked() -> None:
    assert seen(job(), attempt(), pod()).target("pod-uid") == Target(
        "team-a", "faq", "job-uid", "7", 1, "127.64.0.9", None, 100, (1, 1), None
    )


@pytest.mark.parametrize(
    "bodies",
    [
        pytest.param((job(), attempt(), pod(index="1")), id="another pod of the gang"),
        pytest.param((job(), attempt(), pod(of=None)), id="a pod without an owner"),
        pytest.param((job(), attempt(), pod(of="other")), id="a pod of somebody's Job"),
        pytest.param((job(), attempt(of=None), pod()), id="a Job without an owner"),
        pytest.param((job(), attempt(of="other"), pod()), id="a Job of another owner"),
        pytest.param((job(attempt=2, current=None), attempt(), pod()), id="an earlier attempt"),
        pytest.param((job(current="other"), attempt(), pod()), id="a Job that status does not know"),
        pytest.param((job(), attempt(number="one"), pod()), id="a Job without a number"),
        pytest.param((job(), attempt(), pod(state="waiting")), id="a pod that has not begun"),
    ],
)
def test_what_is_not_ours_or_not_running_is_never_asked(bodies: tuple[Body, Body, Body]) -> None:
    assert seen(*bodies).target("pod-uid") is None


def test_an_owner_that_is_not_the_controller_does_not_count() -> None:
    body = pod()
    body["metadata"]["ownerReferences"][0]["controller"] = False
    assert seen(job(), attempt(), body).target("pod-uid") is None


def test_progress_of_an_earlier_attempt_is_not_this_attempts() -> None:
    progress = {
        "attempt": 1,
        "stage": "Training",
        "step": 1,
        "totalSteps": 100,
        "percent": 1,
        "summary": "1% 1/100",
        "updateTime": "2026-01-01T00:00:00Z",
    }
    first = seen(job(progress=progress), attempt(), pod()).target("pod-uid")
    second = seen(job(attempt=2, progress=progress), attempt(number="2"), pod()).target("pod-uid")
    assert first is not None and first.shown is not None and first.shown.step == 1
    assert second is not None and second.shown is None


def test_whichever_is_seen_last_wakes_the_poller() -> None:
    found = Sightings()
    assert found.saw_pod(pod()) == ["pod-uid"]
    assert found.saw_attempt(attempt()) == ["pod-uid"]
    assert found.saw_job(job()) == ["pod-uid"]
    assert found.saw_job(job(version="8")) == []
    assert found.saw_attempt(attempt()) == []
    assert found.saw_pod(pod()) == []


def test_the_end_of_a_pod_is_news_twice() -> None:
    found = seen(job(), attempt(), pod())
    assert found.saw_pod(pod(deleting=True)) == ["pod-uid"]
    assert found.saw_pod(pod(deleting=True)) == []
    assert found.saw_pod(pod(state="terminated", message="{}", deleting=True)) == ["pod-uid"]
    target = found.target("pod-uid")
    assert target is not None and target.termination == "{}"


def test_what_is_forgotten_is_not_asked() -> None:
    for uid in ("job-uid", "attempt-uid", "pod-uid"):
        found = seen(job(), attempt(), pod())
        assert found.known() == {"job-uid", "attempt-uid", "pod-uid"}
        found.forget(uid)
        assert found.target("pod-uid") is None
        assert uid not in found.known()
