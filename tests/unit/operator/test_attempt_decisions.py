"""A released attempt: starting, running, lost nodes, the start deadline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.documents import TerminationMessage
from finetune_api.status import ConditionType, Current, FineTuneJobStatus, Progress, State
from finetune_operator.actions import Create, Delete
from finetune_operator.decide import decide
from finetune_operator.snapshot import Obstacle, Snapshot
from tests.unit.operator.builders import CONFIG, a_job, a_pod, a_pool, a_snapshot, a_spec, an_attempt, ended, later
from tests.unit.operator.world import World

TWO_NODES = a_spec(resources={"nodes": 2, "gpus": 1})


def planned(**fields: Any) -> FineTuneJobStatus:
    """The status of a job whose first attempt is released."""
    world = World(a_job(TWO_NODES))
    world.run(lambda w: w.job.status.current is not None and w.job.status.current.released)
    current = Current(number=1, job_uid="attempt-1", released=True, start_time="2026-11-22T12:00:00Z")
    return world.job.status.model_copy(update={"current": current, **fields})


def look(**fields: Any) -> Snapshot:
    """The released attempt with two running pods."""
    job = a_job(TWO_NODES, status=fields.pop("status", None) or planned())
    return a_snapshot(job, **{"attempts": (an_attempt(),), "pods": (a_pod(index=0), a_pod(index=1)), **fields})


def test_the_gang_is_whole_when_all_pods_run() -> None:
    status = decide(look(now=later(30)), CONFIG).status
    assert status.state == State.TRAINING
    assert status.current is not None and status.current.running_time == "2026-11-22T12:00:30Z"
    assert status.start_time == "2026-11-22T12:00:30Z"
    assert status.is_true(ConditionType.TRAINING)
    scheduled = status.condition(ConditionType.SCHEDULED)
    assert scheduled is not None and scheduled.message == "on node-0, node-1"


@pytest.mark.parametrize(
    ("stage", "state"),
    [("Evaluating", State.EVALUATING), ("Publishing", State.PUBLISHING), ("Loading", State.TRAINING)],
)
def test_the_state_follows_the_stage_of_this_attempt(stage: str, state: State) -> None:
    progress = Progress(
        attempt=1,
        stage=stage,
        step=5,
        total_steps=10,
        percent=50,
        checkpoint_step=4,
        summary="50% 5/10",
        update_time="2026-11-22T12:00:00Z",
    )
    status = decide(look(status=planned(progress=progress)), CONFIG).status
    assert status.state == state
    checkpointed = status.condition(ConditionType.CHECKPOINTED)
    assert checkpointed is not None and checkpointed.message == "at step 4"


def test_why_a_pod_waits_is_told_before_the_start_deadline() -> None:
    waiting = a_pod(index=1, phase="Pending", node=None, unschedulable="0/2 nodes: Insufficient nvidia.com/gpu")
    decision = decide(look(pods=(a_pod(index=0), waiting), now=later(30)), CONFIG)
    assert decision.status.state == State.STARTING
    training = decision.status.condition(ConditionType.TRAINING)
    assert training is not None
    assert (training.reason, training.message) == ("Unschedulable", "0/2 nodes: Insufficient nvidia.com/gpu")
    assert decision.look_again == CONFIG.poll_seconds


def test_a_gang_that_is_not_whole_in_time_is_stopped_and_tried_again_without_using_up_a_retry() -> None:
    waiting = a_pod(index=1, phase="Pending", node=None, unschedulable="no room")
    stopping = decide(look(pods=(a_pod(index=0), waiting), now=later(600)), CONFIG)
    assert stopping.actions == ()
    current = stopping.status.current
    assert current is not None and current.stop_reason == "Unschedulable"
    deleting = decide(look(status=stopping.status, pods=(a_pod(index=0), waiting), now=later(601)), CONFIG)
    assert deleting.actions == (Delete("Job", "faq-0a1b2-1", "attempt-1"),)
    waits = decide(look(status=stopping.status, attempts=(), pods=(a_pod(index=0),), now=later(602)), CONFIG)
    assert waits.status.current is not None
    closed = decide(look(status=stopping.status, attempts=(), pods=(), now=later(603)), CONFIG).status
    assert closed.current is None
    assert [record.outcome for record in closed.attempts] == ["Unschedulable"]
    assert closed.failures is None
    assert closed.next_attempt_time == "2026-11-22T12:10:05Z"
    assert closed.state == State.RETRYING


def test_a_secret_that_is_missing_when_the_attempt_starts_ends_the_job_at_the_start_deadline() -> None:
    pod = a_pod(
        index=0,
        phase="Pending",
        waiting_reason="CreateContainerConfigError",
        waiting_message='secret "team-a-s3" not found',
    )
    stopped = decide(look(pods=(pod,), now=later(600)), CONFIG).status
    status = decide(look(status=stopped, attempts=(), pods=(), now=later(610)), CONFIG).status
    assert status.state == State.FAILED
    assert status.failure is not None
    assert (status.failure.failure_class, status.failure.field) == ("ReferenceNotFound", "spec.credentials.secretName")


def test_a_node_that_cannot_start_the_container_is_avoided_by_the_next_attempt() -> None:
    pod = a_pod(phase="Pending", waiting_reason="RunContainerError", waiting_message="exec format error")
    stopped = decide(look(pods=(pod, a_pod(index=1)), now=later(600)), CONFIG).status
    assert stopped.current is not None
    assert (stopped.current.stop_reason, stopped.current.avoid_node) == ("ContainerCannotRun", "node-0")
    closed = decide(look(status=stopped, attempts=(), pods=(), now=later(610)), CONFIG).status
    assert [(entry.outcome, entry.avoid_node) for entry in closed.attempts] == [("ContainerCannotRun", "node-0")]
    assert (closed.state, closed.failures) == (State.RETRYING, 1)


def test_a_pod_stuck_on_a_node_that_does_not_answer_means_that_the_node_is_lost() -> None:
    stuck = a_pod(index=1, deletion_time=later(0))
    seen = {"pods": (a_pod(index=0), stuck), "unreachable_nodes": frozenset({"node-1"})}
    early = decide(look(**seen, now=later(CONFIG.node_lost_seconds)), CONFIG).status
    assert early.current is not None and early.current.stop_reason is None
    late = decide(look(**seen, now=later(CONFIG.node_lost_seconds + 1)), CONFIG).status
    assert late.current is not None
    assert (late.current.stop_reason, late.current.avoid_node) == ("NodeLost", "node-1")
    survivor = decide(look(status=late, attempts=(), **seen, now=later(40)), CONFIG).status
    assert survivor.current is not None, "waits for the pod on the node that answers"
    closed = decide(
        look(status=late, attempts=(), pods=(stuck,), unreachable_nodes=frozenset({"node-1"}), now=later(50)), CONFIG
    ).status
    assert [(r.outcome, r.avoid_node) for r in closed.attempts] == [("NodeLost", "node-1")]
    assert closed.interruptions == 1


HUNG = TerminationMessage(outcome="Hang", message="rank 0 made no step").encode().decode()


def test_a_node_that_was_lost_under_a_gang_uses_up_no_retry_though_its_pod_is_gone_and_the_others_hung() -> None:
    hung = ended(a_pod(index=0), 84, HUNG)
    silent = a_pod(index=1, deletion_time=later(120))  # the Job controller ends the rest of the gang
    seen = decide(look(pods=(hung, silent), unreachable_nodes=frozenset({"node-1"}), now=later(61)), CONFIG).status
    assert seen.current is not None
    assert (seen.current.avoid_node, seen.current.stop_reason) == ("node-1", None)
    failed = an_attempt(finished="Failed", reason="PodFailurePolicy", message="exit code 84")
    closed = decide(look(status=seen, attempts=(failed,), pods=(hung,), now=later(100)), CONFIG).status
    assert [(entry.outcome, entry.avoid_node) for entry in closed.attempts] == [("NodeLost", "node-1")]
    assert (closed.failures, closed.interruptions) == (None, 1)


def test_a_gang_that_hung_on_nodes_that_answer_has_hung() -> None:
    hung = ended(a_pod(index=0), 84, HUNG)
    seen = decide(look(pods=(hung, a_pod(index=1, deletion_time=later(120))), now=later(61)), CONFIG).status
    assert seen.current is not None and seen.current.avoid_node is None
    failed = an_attempt(finished="Failed", reason="PodFailurePolicy", message="exit code 84")
    for left in ((hung,), (hung, ended(a_pod(index=1), 137, exit_reason="Error"))):
        closed = decide(look(status=seen, attempts=(failed,), pods=left, now=later(100)), CONFIG).status
        assert [(entry.outcome, entry.avoid_node) for entry in closed.attempts] == [("Hang", None)]
        assert closed.failures == 1


def test_later_attempts_avoid_a_lost_node() -> None:
    world = World()
    world.run(lambda w: w.job.status.state == State.TRAINING)
    current = world.job.status.current
    assert current is not None
    lost = world.job.status.model_copy(
        update={"current": current.model_copy(update={"stop_reason": "NodeLost", "avoid_node": "node-0"})}
    )
    world._write(lost)
    created: list[Create] = []
    apply = world._apply
    world._apply = lambda action: (created.append(action) if isinstance(action, Create) else None, apply(action))[1]  # type: ignore[method-assign]
    world.run_to_the_end()
    jobs = [action.manifest for action in created if action.kind == "Job"]
    terms = jobs[0]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-0"]}]}
    ]


def test_a_pool_that_is_gone_holds_the_next_attempt_and_says_so() -> None:
    job = a_job(TWO_NODES, status=planned(current=None))
    decision = decide(a_snapshot(job, pools=(a_pool("other"),)), CONFIG)
    assert decision.actions == ()
    assert decision.status.state == State.QUEUED
    assert "a100 does not exist" in (decision.status.message or "")


def test_a_refused_job_is_told_and_ends_the_run_only_where_time_does_not_help() -> None:
    world = World(a_job(TWO_NODES))
    world.run(lambda w: w.job.status.current is not None)
    fresh = world.job.status.model_copy(
        update={"current": Current(number=1, start_time="2026-11-22T12:00:00Z"), "attempts": []}
    )
    quota = Obstacle("Job", "faq-0a1b2-1", "QuotaExceeded", "exceeded quota: count/jobs.batch")
    waits = decide(look(status=fresh, attempts=(), pods=(), obstacles=(quota,)), CONFIG).status
    assert waits.state == State.QUEUED
    assert "exceeded quota" in (waits.message or "")
    denied = Obstacle("Job", "faq-0a1b2-1", "AdmissionDenied", "denied by policy gpu-owners")
    ended = decide(look(status=fresh, attempts=(), pods=(), obstacles=(denied,)), CONFIG).status
    assert ended.state == State.FAILED
    assert ended.failure is not None and "gpu-owners" in ended.failure.message


def test_a_job_of_the_same_name_with_another_uid_is_not_ours() -> None:
    foreign = an_attempt(uid="somebody-elses")
    status = decide(look(attempts=(foreign,), pods=()), CONFIG).status
    assert [record.outcome for record in status.attempts] == ["AttemptDeleted"]


def test_a_planned_run_that_this_release_cannot_read_is_left_alone() -> None:
    seen = look()
    job = replace(seen.job, spec=None, spec_error=("spec.tuning.type", "Input should be 'Full'"))
    decision = decide(replace(seen, job=job), CONFIG)
    assert decision.actions == ()
    assert decision.status.current == seen.status.current
    assert "cannot read spec.tuning.type" in (decision.status.message or "")
