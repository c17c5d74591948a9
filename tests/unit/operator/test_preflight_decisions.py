"""Before the plan: what is refused, what is tried again, and what a new generation changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api import naming
from finetune_api.planner import spec_digest
from finetune_api.status import ConditionType, Finding, FineTuneJobStatus, Preflight, State
from finetune_operator.actions import Create, Delete, Release
from finetune_operator.clock import format_time
from finetune_operator.decide import decide
from finetune_operator.snapshot import ChildJob, Obstacle, PodView, Snapshot, WarningEvent
from tests.unit.operator.builders import (
    CONFIG,
    START,
    UID,
    a_job,
    a_pod,
    a_pool,
    a_snapshot,
    a_spec,
    ended,
    later,
    passed,
)

NAME = naming.preflight_name("faq", UID, 1)


def seen_before(**fields: Any) -> FineTuneJobStatus:
    """The status after the first sight."""
    first = decide(a_snapshot(a_job()), CONFIG).status
    return first.model_copy(update=fields)


def preflight(**fields: Any) -> ChildJob:
    """The released preflight Job of generation 1."""
    return ChildJob(
        **{"name": NAME, "uid": "pre", "role": naming.ROLE_PREFLIGHT, "number": 1, "created": START, **fields}
    )


def pending(**fields: Any) -> PodView:
    """A preflight pod that has not started."""
    return a_pod("pre", role=naming.ROLE_PREFLIGHT, phase="Pending", **fields)


def look(spec: Any = None, **fields: Any) -> Snapshot:
    """A job that was seen before, with its preflight Job."""
    job = a_job(spec, status=fields.pop("status", None) or seen_before())
    return a_snapshot(job, **{"preflights": (preflight(),), **fields})


def said(findings: list[Finding], *, ok: bool = False) -> str:
    """What a preflight container leaves."""
    found = Preflight(ok=ok, spec_digest=spec_digest(a_spec()), findings=findings, findings_total=len(findings))
    return found.model_dump_json(by_alias=True, exclude_none=True)


def test_a_job_is_created_suspended_then_given_its_file_then_released() -> None:
    first = decide(look(preflights=()), CONFIG)
    assert [type(action) for action in first.actions] == [Create]
    created = first.actions[0]
    assert isinstance(created, Create)
    assert created.manifest["spec"]["suspend"] is True
    second = decide(look(preflights=(preflight(suspended=True),)), CONFIG)
    assert [type(action) for action in second.actions] == [Create, Release]
    assert second.actions[1] == Release(NAME, "pre")


def test_an_unsupported_field_is_refused_by_name_without_any_pod() -> None:
    spec = a_spec(queueName="team-a", tuning={"type": "Full"}, output={"uri": "s3://b/o", "mergeAdapter": True})
    decision = decide(look(spec, preflights=()), CONFIG)
    assert decision.actions == ()
    assert decision.status.state == State.INVALID
    failure = decision.status.failure
    assert failure is not None
    assert (failure.failure_class, failure.field) == ("UnsupportedField", "spec.output.mergeAdapter")
    assert "queueName" in failure.message
    assert decision.status.is_true(ConditionType.FAILED)
    assert decision.status.is_true(ConditionType.FINISHED)
    assert decision.status.is_true(ConditionType.STALLED)
    assert [event.reason for event in decision.events] == ["UnsupportedField"]


def test_a_local_file_is_refused_in_a_cluster() -> None:
    spec = a_spec(dataset={"sources": [{"uri": "file:///data/train.jsonl"}]})
    failure = decide(look(spec, preflights=()), CONFIG).status.failure
    assert failure is not None
    assert (failure.failure_class, failure.field) == ("InvalidSpec", "spec.dataset.sources[0].uri")


def test_a_spec_that_cannot_be_read_is_refused_and_not_a_crash() -> None:
    job = a_job(status=seen_before(), spec=None, spec_error=("spec.tuning.type", "Input should be 'Full'"))
    job = replace(job, spec=None)
    failure = decide(a_snapshot(job), CONFIG).status.failure
    assert failure is not None
    assert (failure.failure_class, failure.field) == ("InvalidSpec", "spec.tuning.type")


def test_a_finding_of_the_user_makes_the_job_invalid_with_the_cause_and_the_field() -> None:
    finding = Finding(
        failure_class="DataNotFound",
        message="s3://team-a/faq/train.jsonl does not exist",
        field="spec.dataset.sources[0].uri",
    )
    pod = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 66, said([finding]))
    status = decide(look(pods=(pod,)), CONFIG).status
    assert status.state == State.INVALID
    assert status.preflight is not None and status.preflight.findings == [finding]
    validated = status.condition(ConditionType.VALIDATED)
    assert validated is not None
    assert (validated.status.value, validated.reason) == ("False", "DataNotFound")
    assert status.failure is not None and status.failure.field == "spec.dataset.sources[0].uri"


def test_an_invalid_job_stays_as_it_is_until_it_is_edited() -> None:
    finding = Finding(failure_class="DataNotFound", message="gone")
    pod = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 66, said([finding]))
    invalid = decide(look(pods=(pod,)), CONFIG).status
    done = preflight(finished="Failed")
    again = decide(look(status=invalid, preflights=(done,), pods=(pod,)), CONFIG)
    assert again.actions == ()
    assert again.status == invalid

    edited = replace(look(status=invalid, preflights=(done,)).job, generation=2)
    reset = decide(a_snapshot(edited, preflights=(done,)), CONFIG)
    assert reset.status.failure is None
    assert not reset.status.is_true(ConditionType.FAILED)
    assert not reset.status.is_true(ConditionType.FINISHED)
    onwards = decide(a_snapshot(replace(edited, status=reset.status), preflights=(done,)), CONFIG)
    assert [type(action) for action in onwards.actions] == [Delete, Create]
    assert isinstance(onwards.actions[1], Create)
    assert onwards.actions[1].name == naming.preflight_name("faq", UID, 2)


def test_storage_that_does_not_answer_is_tried_again_after_a_while() -> None:
    pod = ended(
        a_pod("pre", role=naming.ROLE_PREFLIGHT),
        86,
        said([Finding(failure_class="StorageUnavailable", message="no answer")]),
    )
    status = decide(look(pods=(pod,)), CONFIG).status
    assert status.state == State.PREFLIGHT
    assert (status.failures, status.next_attempt_time) == (1, "2026-11-22T12:00:02Z")
    cleared = decide(look(status=status, pods=(pod,)), CONFIG)
    assert cleared.actions == (Delete("Job", NAME, "pre"),)
    waiting = decide(look(status=status, preflights=()), CONFIG)
    assert (waiting.actions, waiting.look_again) == ((), 2.0)
    due = decide(look(status=status, preflights=(), now=later(2)), CONFIG)
    assert due.status.next_attempt_time is None


def test_storage_that_never_answers_makes_the_job_invalid_in_the_end() -> None:
    pod = ended(
        a_pod("pre", role=naming.ROLE_PREFLIGHT),
        86,
        said([Finding(failure_class="StorageUnavailable", message="no answer")]),
    )
    status = decide(look(pods=(pod,), status=seen_before(failures=3)), CONFIG).status
    assert status.state == State.INVALID
    assert status.failure is not None and status.failure.failure_class == "StorageUnavailable"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ('secret "team-a-s3" not found', "spec.credentials.secretName"),
        ("couldn't find key AWS_ACCESS_KEY_ID in Secret team-a/team-a-s3", "spec.credentials.secretName"),
    ],
)
def test_a_missing_secret_is_told_at_once_and_the_job_goes_on_when_it_exists(message: str, field: str) -> None:
    pod = pending(waiting_reason="CreateContainerConfigError", waiting_message=message)
    refused = decide(look(pods=(pod,)), CONFIG).status
    assert refused.state == State.INVALID
    assert refused.is_true(ConditionType.FAILED)
    assert refused.failure is not None
    assert (refused.failure.failure_class, refused.failure.field) == ("ReferenceNotFound", field)
    running = a_pod("pre", role=naming.ROLE_PREFLIGHT)
    onwards = decide(look(status=refused, pods=(running,)), CONFIG).status
    assert onwards.state == State.PREFLIGHT
    assert onwards.failure is None
    assert not onwards.is_true(ConditionType.FAILED)


@pytest.mark.parametrize(
    ("text", "failure_class", "failed"),
    [
        (
            'pods "x" is forbidden: error looking up service account team-a/ml: serviceaccount "ml" not found',
            "ReferenceNotFound",
            True,
        ),
        (
            'pods "x" is forbidden: exceeded quota: gpus, requested: cpu=1, used: cpu=0, limited: cpu=0',
            "QuotaExceeded",
            False,
        ),
        (
            'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
            "AdmissionDenied",
            True,
        ),
        ('pods "x" is forbidden: no PriorityClass with name high was found', "InvalidSpec", True),
    ],
)
def test_a_pod_that_cannot_be_created_is_told_by_its_event(text: str, failure_class: str, failed: bool) -> None:
    seen = look(warnings=(WarningEvent("pre", "FailedCreate", f"Error creating: {text}"),))
    status = decide(seen, CONFIG).status
    validated = status.condition(ConditionType.VALIDATED)
    assert validated is not None
    assert validated.reason == failure_class
    assert status.is_true(ConditionType.FAILED) is failed
    assert decide(seen, CONFIG).look_again == CONFIG.poll_seconds


def test_an_image_that_cannot_be_pulled_is_told_at_once_and_counted_at_the_start_limit() -> None:
    pod = pending(waiting_reason="ImagePullBackOff", waiting_message="Back-off pulling image")
    early = decide(look(pods=(pod,)), CONFIG).status
    validated = early.condition(ConditionType.VALIDATED)
    assert validated is not None
    assert (validated.status.value, validated.reason) == ("Unknown", "ImagePullFailed")
    assert not early.is_true(ConditionType.FAILED)
    late = decide(look(pods=(pod,), now=later(CONFIG.preflight_start_seconds)), CONFIG).status
    assert late.failures == 1
    assert late.failure is not None and late.failure.failure_class == "ImagePullFailed"


def test_a_result_about_another_spec_is_not_believed() -> None:
    other = passed(a_spec(tuning={"type": "LoRA"})).model_dump_json(by_alias=True, exclude_none=True)
    pod = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 0, other)
    status = decide(look(pods=(pod,)), CONFIG).status
    assert status.preflight is None
    assert status.failure is not None and status.failure.failure_class == "Internal"


def test_no_pool_that_fits_is_told_with_what_every_pool_lacks() -> None:
    seen = look(
        a_spec(resources={"gpus": 16}),
        status=seen_before(preflight=passed(a_spec())),
        pools=(a_pool("a100"), a_pool("l4", gpuMemoryGiB=24)),
    )
    status = decide(seen, CONFIG).status
    assert status.state == State.INVALID
    planned = status.condition(ConditionType.PLANNED)
    assert planned is not None
    assert planned.reason == "NoPoolFits"
    assert "a100:" in planned.message and "l4:" in planned.message


def test_a_suspended_job_runs_no_preflight_until_it_is_resumed() -> None:
    status = decide(look(a_spec(suspend=True)), CONFIG)
    assert status.actions == (Delete("Job", NAME, "pre"),)
    assert status.status.state == State.SUSPENDED
    assert status.status.is_true(ConditionType.SUSPENDED)


def test_a_job_cancelled_before_the_plan_is_at_its_end() -> None:
    decision = decide(look(a_spec(cancel=True)), CONFIG)
    assert decision.status.state == State.CANCELLED
    assert decision.actions == (Delete("Job", NAME, "pre"),)


def test_a_foreign_object_with_the_name_of_a_child_is_told() -> None:
    message = f"Job team-a/{NAME} exists and is not ours; delete or rename it"
    seen = look(preflights=(), obstacles=(Obstacle("Job", NAME, "NameTaken", message),))
    decision = decide(seen, CONFIG)
    validated = decision.status.condition(ConditionType.VALIDATED)
    assert validated is not None
    assert (validated.reason, validated.message) == ("NameTaken", message)
    assert decision.look_again == CONFIG.retry_base_seconds


def test_a_preflight_on_a_lost_node_is_tried_again() -> None:
    stuck = a_pod("pre", role=naming.ROLE_PREFLIGHT, deletion_time=START)
    seen = look(pods=(stuck,), unreachable_nodes=frozenset({"node-0"}), now=later(CONFIG.node_lost_seconds + 1))
    status = decide(seen, CONFIG).status
    assert status.failure is not None and status.failure.failure_class == "NodeLost"
    assert status.next_attempt_time is not None
    assert status.failures is None, "an interruption is no failure"


def lost(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """After a preflight whose node was lost, and the pause that follows."""
    stuck = a_pod("pre", role=naming.ROLE_PREFLIGHT, deletion_time=START)
    now = later(CONFIG.node_lost_seconds + 1)
    seen = look(status=status, pods=(stuck,), unreachable_nodes=frozenset({"node-0"}), now=now)
    return decide(seen, CONFIG).status.model_copy(update={"next_attempt_time": None})


def test_a_preflight_that_finds_no_room_is_tried_again_without_end_and_without_a_failure() -> None:
    status = seen_before()
    quota = WarningEvent("pre", "FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus')
    for _ in range(10):
        seen = look(status=status, warnings=(quota,), now=later(CONFIG.preflight_start_seconds))
        status = decide(seen, CONFIG).status
        assert status.failure is not None and status.failure.failure_class == "QuotaExceeded"
        assert (status.failures, status.state) == (None, State.PREFLIGHT)
        assert status.next_attempt_time == format_time(
            later(CONFIG.preflight_start_seconds + CONFIG.retry_base_seconds)
        )
        status = status.model_copy(update={"next_attempt_time": None})
    status = lost(status)
    assert (status.state, status.interruptions_without_checkpoint) == (State.PREFLIGHT, 1), "waiting is no interruption"


def test_five_interruptions_in_a_row_end_a_preflight_and_a_failure_breaks_the_row() -> None:
    status = seen_before()
    for _ in range(4):
        status = lost(status)
    silent = said([Finding(failure_class="StorageUnavailable", message="no answer")])
    no_answer = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 86, silent)
    failed = decide(look(status=status, pods=(no_answer,)), CONFIG).status
    assert (failed.state, failed.failures, failed.interruptions_without_checkpoint) == (State.PREFLIGHT, 1, None)
    once_more = lost(failed.model_copy(update={"next_attempt_time": None}))
    assert (once_more.state, once_more.interruptions_without_checkpoint) == (State.PREFLIGHT, 1)
    fifth = lost(status)
    assert fifth.state == State.INVALID
    assert fifth.failure is not None and fifth.failure.failure_class == "NoProgress"


def test_a_preflight_is_tried_again_as_often_as_its_class_allows() -> None:
    pod = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 137, exit_reason="OOMKilled")
    first = decide(look(pods=(pod,)), CONFIG).status
    assert (first.failures, first.state) == (1, State.PREFLIGHT)
    again = first.model_copy(update={"next_attempt_time": None})
    assert decide(look(status=again, pods=(pod,)), CONFIG).status.state == State.INVALID


def test_a_preflights_bound_is_that_of_its_class_and_not_of_all_failures_together() -> None:
    silent = said([Finding(failure_class="StorageUnavailable", message="no answer")])
    no_answer = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 86, silent)
    no_memory = ended(a_pod("pre", role=naming.ROLE_PREFLIGHT), 137, exit_reason="OOMKilled")
    status = seen_before()
    for pod, counts in (
        (no_answer, {"StorageUnavailable": 1}),
        (no_answer, {"StorageUnavailable": 2}),
        (no_memory, {"StorageUnavailable": 2, "OutOfHostMemory": 1}),
    ):
        status = decide(look(status=status, pods=(pod,)), CONFIG).status
        assert (status.state, status.preflight_failures) == (State.PREFLIGHT, counts)
        status = status.model_copy(update={"next_attempt_time": None})
    assert status.failures == 3
    assert decide(look(status=status, pods=(no_memory,)), CONFIG).status.state == State.INVALID, "its own second"
    assert decide(look(status=status, pods=(no_answer,)), CONFIG).status.state == State.INVALID, "retry.maxFailures"


def test_what_preflights_counted_ends_with_the_plan_and_with_an_edit() -> None:
    failed = seen_before(failures=1, preflight_failures={"OutOfHostMemory": 1})
    edited = decide(look(status=failed.model_copy(update={"observed_generation": 0}), preflights=()), CONFIG).status
    assert (edited.failures, edited.preflight_failures) == (None, {})
    found = failed.model_copy(update={"preflight": passed(a_spec())})
    planned = decide(look(status=found, preflights=(), pools=(a_pool(),)), CONFIG).status
    assert planned.plan is not None
    assert (planned.failures, planned.preflight_failures) == (None, {})
