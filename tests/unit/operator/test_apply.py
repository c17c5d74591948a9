"""Carrying out actions: what the API server's answers mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from finetune_api.status import FineTuneJobStatus, Progress
from finetune_operator.actions import Create, Delete, Release
from finetune_operator.apply import apply
from finetune_operator.decide import decide
from finetune_operator.kube import ApiError, Body, Conflict, Kube, NotFound
from finetune_operator.status import write_status
from tests.unit.operator.builders import CONFIG, a_job, a_snapshot


def a_child(uid: str = "ours", **metadata: Any) -> dict[str, Any]:
    """A Job with that controller."""
    owners = [{"uid": uid, "controller": True}]
    return {"kind": "Job", "metadata": {"name": "faq-1", "namespace": "team-a", "ownerReferences": owners, **metadata}}


class Server:
    """Answers creates with one error, or stores them; keeps what it was asked, in order."""

    def __init__(self, error: ApiError | None = None, stored: dict[str, Any] | None = None) -> None:
        self.error = error
        self.stored = stored
        self.calls: list[tuple[str, Any]] = []

    async def create(self, body: Mapping[str, Any]) -> Body:
        self.calls.append(("create", body["metadata"]["name"]))
        if self.error is not None:
            raise self.error
        return dict(body)

    async def get(self, kind: str, name: str, namespace: str | None = None) -> Body:
        if self.stored is None:
            raise NotFound(404, "NotFound", name)
        return self.stored

    async def merge(self, kind: str, name: str, namespace: str, patch: Mapping[str, Any]) -> Body:
        self.calls.append(("merge", patch))
        return {}

    async def delete(self, kind: str, name: str, namespace: str, uid: str) -> None:
        self.calls.append(("delete", uid))

    async def apply_status(self, body: Mapping[str, Any]) -> Body:
        self.calls.append(("status", body))
        return dict(body)


EXISTS = Conflict(409, "AlreadyExists", "it exists")


async def test_actions_are_carried_out_in_order() -> None:
    server = Server()
    actions = [Delete("Job", "old", "u0"), Create(a_child()), Release("faq-1", "u1")]
    assert await apply(cast(Kube, server), "team-a", actions) is None
    released = {"metadata": {"uid": "u1"}, "spec": {"suspend": False}}
    assert server.calls == [("delete", "u0"), ("create", "faq-1"), ("merge", released)]


async def test_a_child_of_ours_that_exists_already_is_left_as_it_is() -> None:
    server = Server(EXISTS, a_child())
    assert await apply(cast(Kube, server), "team-a", [Create(a_child())]) is None


async def test_a_foreign_object_is_in_the_way_and_nothing_after_it_is_done() -> None:
    server = Server(EXISTS, a_child("somebody"))
    obstacle = await apply(cast(Kube, server), "team-a", [Create(a_child()), Release("faq-1", "u1")])
    assert obstacle is not None
    assert (obstacle.failure_class, obstacle.name) == ("NameTaken", "faq-1")
    assert server.calls == [("create", "faq-1")]


@pytest.mark.parametrize("stored", [None, a_child(deletionTimestamp="2026-11-22T12:00:00Z")])
async def test_a_child_on_its_way_out_is_waited_for(stored: dict[str, Any] | None) -> None:
    with pytest.raises(Conflict):
        await apply(cast(Kube, Server(EXISTS, stored)), "team-a", [Create(a_child())])


@pytest.mark.parametrize(
    ("code", "message", "failure_class"),
    [
        (403, 'jobs.batch "faq-1" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1', "QuotaExceeded"),
        (422, "ValidatingAdmissionPolicy 'use-service-account' denied request: not allowed", "AdmissionDenied"),
    ],
)
async def test_a_refusal_is_told_with_its_class(code: int, message: str, failure_class: str) -> None:
    obstacle = await apply(cast(Kube, Server(ApiError(code, "Forbidden", message))), "team-a", [Create(a_child())])
    assert obstacle is not None
    assert (obstacle.failure_class, obstacle.message) == (failure_class, message)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (403, 'jobs.batch is forbidden: User "operator" cannot create resource "jobs" in API group "batch"'),
        (403, "unable to create new content in namespace team-a because it is being terminated"),
        (500, "etcd is away"),
        (429, "too many requests"),
    ],
)
async def test_what_is_no_fault_of_the_job_is_tried_again(code: int, message: str) -> None:
    with pytest.raises(ApiError):
        await apply(cast(Kube, Server(ApiError(code, "", message))), "team-a", [Create(a_child())])


async def test_status_is_written_with_the_version_that_was_read_and_never_holds_progress() -> None:
    progress = Progress(
        attempt=1,
        stage="Training",
        step=1,
        total_steps=2,
        percent=50,
        summary="50% 1/2",
        update_time="2026-11-22T12:00:00Z",
    )
    job = a_job(resource_version="41")
    wanted = decide(a_snapshot(job), CONFIG).status.model_copy(update={"progress": progress})
    server = Server()
    assert await write_status(cast(Kube, server), job, wanted)
    [(_, body)] = server.calls
    assert body["metadata"]["resourceVersion"] == "41"
    assert "progress" not in body["status"]
    assert body["status"]["state"] == "Pending"


async def test_status_that_says_nothing_new_is_not_written() -> None:
    wanted = decide(a_snapshot(a_job()), CONFIG).status
    server = Server()
    assert not await write_status(cast(Kube, server), a_job(status=wanted), wanted)
    assert server.calls == []


def test_a_map_that_has_become_empty_is_left_out_of_what_is_applied() -> None:
    held = FineTuneJobStatus(preflight_failures={"StorageUnavailable": 1}, endings={"Stopped": 1})
    assert held.to_json().keys() >= {"preflightFailures", "endings"}
    emptied = held.model_copy(update={"preflight_failures": {}, "endings": {}})
    assert emptied.to_json().keys().isdisjoint({"preflightFailures", "endings"})
