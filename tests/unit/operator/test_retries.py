"""What is tried again, how often, where, and what stays in status of each attempt."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from finetune_api.documents import Spent
from finetune_api.failures import TABLE, Fault
from finetune_api.status import AttemptRecord, ConditionType, FineTuneJobStatus, State, TimeSpent
from finetune_operator.actions import Create
from finetune_operator.clock import parse_time
from finetune_operator.decide.history import nodes_to_avoid, saved_step
from tests.unit.operator.builders import a_job, a_spec, later
from tests.unit.operator.test_goodput import parts
from tests.unit.operator.test_guards_told import progress
from tests.unit.operator.world import World

PATIENT = a_spec(retry={"maxFailures": 100})


def lived(*outcomes: str, spec: Any = PATIENT, **fields: Any) -> FineTuneJobStatus:
    """The status at the end of a job whose attempts end like this; the last one repeats."""
    return World(a_job(spec), outcomes=outcomes, **fields).run_to_the_end().job.status


def told(status: FineTuneJobStatus, kind: ConditionType) -> str:
    condition = status.condition(kind)
    assert condition is not None
    return condition.message


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if row.exit_code is not None and row.counted])
def test_a_class_is_tried_again_as_often_as_the_table_says(name: str) -> None:
    retries = min(TABLE[name].retries, 6)
    spec = a_spec(retry={"maxFailures": 6})
    status = lived(name, spec=spec)
    assert status.state == State.FAILED
    assert status.endings == {name: retries + 1}
    assert status.failures == retries + 1
    assert status.failure is not None and status.failure.failure_class == name


@pytest.mark.parametrize("limit", [0, 1])
def test_no_class_is_tried_again_more_often_than_the_job_allows(limit: int) -> None:
    spec = a_spec(retry={"maxFailures": limit})
    for name in ("AcceleratorMismatch", "Internal", "Hang"):
        assert lived(name, spec=spec).endings == {name: limit + 1}


def test_a_bound_is_that_of_its_class_and_not_of_all_failures_together() -> None:
    mixed = lived("Internal", "OutOfHostMemory", "AcceleratorMismatch", "Internal", "AcceleratorMismatch", "Succeeded")
    assert mixed.state == State.SUCCEEDED
    assert mixed.endings == {"Internal": 2, "OutOfHostMemory": 1, "AcceleratorMismatch": 2, "Succeeded": 1}
    twice = lived("OutOfHostMemory", "Evicted", "Hang", "Evicted", "Hang", "Evicted", "Hang", "OutOfHostMemory")
    assert twice.endings["OutOfHostMemory"] == 2, "also where the first one is no longer in status.attempts"
    assert "came 2 times and is retried at most 1×" in told(twice, ConditionType.FAILED)


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if row.fault == Fault.INTERRUPTION])
def test_an_interruption_is_followed_by_another_attempt_also_where_nothing_may_be_retried(name: str) -> None:
    world = World(a_job(a_spec(retry={"maxFailures": 0})), outcomes=(name, "Succeeded"), run_seconds=20)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    if name == "AttemptDeleted":
        world.delete_job("faq-0a1b2-1")
    elif name == "NodeLost":
        disrupt(world, "DeletionByTaintManager")
    status = world.run_to_the_end().job.status
    assert [entry.outcome for entry in status.attempts] == [name, "Succeeded"]
    assert (status.failures, status.interruptions) == (None, 1)


def disrupt(world: World, reason: str) -> None:
    """The node controller or the scheduler ends the running pods."""
    for uid, pod in world.pods.items():
        world.pods[uid] = replace(
            pod, phase="Failed", ended=True, exit_code=143, exit_time=world.now, disruption=reason
        )
    for name, child in world.jobs.items():
        world.jobs[name] = replace(child, finished="Failed")


def test_the_next_attempt_starts_only_when_no_old_pod_holds_a_gpu_any_more() -> None:
    world = World(a_job(a_spec(resources={"nodes": 2, "gpus": 1})), outcomes=("Hang", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    second = list(world.pods.values())[1]
    world.pods[second.uid] = replace(second, phase="Running", ended=False)  # the Job is Failed, one pod still stops
    for _ in range(30):
        world.tick()
        world.reconcile()
    assert world.job.status.attempt == 1, "the old pod still runs"
    world.pods[second.uid] = second
    world.run_to_the_end()
    assert [entry.outcome for entry in world.job.status.attempts] == ["Hang", "Succeeded"]


def affinity(world: World) -> list[str]:
    """The nodes that the newest attempt's pods avoid."""
    created: list[Create] = []
    apply = world._apply

    def watch(action: Any) -> None:
        if isinstance(action, Create) and action.kind == "Job":
            created.append(action)
        apply(action)

    world._apply = watch  # type: ignore[method-assign]
    world.run_to_the_end()
    pod = created[-1].manifest["spec"]["template"]["spec"]
    terms = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [term["matchFields"][0]["values"][0] for term in terms.get("nodeSelectorTerms", [])]


def test_an_attempt_avoids_the_node_whose_accelerator_could_not_be_used() -> None:
    world = World(outcomes=("AcceleratorMismatch", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    assert [entry.avoid_node for entry in world.job.status.attempts] == ["node-0"]
    assert affinity(world) == ["node-0"]


def entry(outcome: str, node: str | None = None) -> AttemptRecord:
    return AttemptRecord(number=1, pool="a100", start_time="", end_time="", outcome=outcome, avoid_node=node)


def test_nodes_get_another_chance_once_there_is_no_room_without_them() -> None:
    lost = [entry("NodeLost", "node-1"), entry("AcceleratorMismatch", "node-2"), entry("NodeLost", "node-1")]
    assert nodes_to_avoid(lost) == ("node-2", "node-1")
    assert nodes_to_avoid([*lost, entry("Unschedulable")]) == ()
    assert nodes_to_avoid([*lost, entry("Unschedulable"), entry("NodeLost", "node-3"), entry("Evicted")]) == ("node-3",)


def test_a_guards_decisions_are_progress_but_not_without_end() -> None:
    decided = lived(*["Evicted"] * 4, *["RolledBack"] * 11, *["Evicted"] * 4, "Succeeded")
    assert decided.state == State.SUCCEEDED
    assert decided.interruptions == 19
    endless = lived("RolledBack")
    assert endless.state == State.FAILED
    assert endless.failure is not None and endless.failure.failure_class == "NoProgress"
    assert endless.endings["RolledBack"] == 11 + 5


def test_a_rollback_inside_an_attempt_is_progress_though_its_checkpoints_are_behind_the_newest() -> None:
    world = World(outcomes=("Evicted",), run_seconds=20, words={"resumed_from_step": 40, "checkpoint_step": 40})
    for number in range(1, 5):
        world.run(lambda w, number=number: len(w.job.status.attempts) == number, seconds=2000)
    assert world.job.status.interruptions_without_checkpoint == 4
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.words = {"resumed_from_step": 10, "checkpoint_step": 20}
    gone_back = progress(attempt=5, rollbacks=1, resumed_from_step=10, checkpoint_step=20)
    world.job = replace(world.job, status=world.job.status.model_copy(update={"progress": gone_back}))
    world.run(lambda w: len(w.job.status.attempts) == 5 and w.job.status.current is None)
    assert world.job.status.state == State.RETRYING
    assert world.job.status.interruptions_without_checkpoint == 1
    assert world.run_to_the_end().job.status.interruptions == 9, "once: the rollback is no news a second time"


def test_a_checkpoint_that_was_only_taken_up_is_no_progress() -> None:
    status = lived("Evicted", words={"resumed_from_step": 40, "checkpoint_step": 40, "step": 45})
    assert status.failure is not None and status.failure.failure_class == "NoProgress"
    assert status.interruptions == 5


def cut_off_at(steps: list[int | None]) -> FineTuneJobStatus:
    """Lives that are cut off without last words. Of each the poller saw at most where it began, and no save."""
    world = World(a_job(PATIENT), run_seconds=1000)
    for number, resumed in enumerate(steps, start=1):
        world.run(lambda w: w.job.status.state == State.TRAINING)
        seen = progress(attempt=number, resumed_from_step=resumed, checkpoint_step=resumed)
        world.job = replace(world.job, status=world.job.status.model_copy(update={"progress": seen}))
        world.delete_job(f"faq-0a1b2-{number}")
        world.run(
            lambda w, number=number: len(w.job.status.attempts) == min(number, 5) and w.job.status.current is None
        )
        world.reconcile()
    return world.job.status


def test_a_checkpoint_that_only_the_next_attempt_found_is_progress_of_the_one_before() -> None:
    on_and_on = cut_off_at([None, 5, 10, 15, 20, 25, 30])
    assert (on_and_on.state, on_and_on.interruptions) == (State.RETRYING, 7)
    assert on_and_on.interruptions_without_checkpoint == 2, "the last two lives: nobody knows of a save in them"
    assert cut_off_at([None, None, None, 5]).interruptions_without_checkpoint == 2
    assert cut_off_at([5, 5, 5, 5]).interruptions_without_checkpoint == 4
    assert cut_off_at([None, None, None, 5, 5, 5]).state == State.RETRYING
    stuck = cut_off_at([None, None, None, 5, 5, 5, 5])
    assert stuck.failure is not None and stuck.failure.failure_class == "NoProgress"


def test_an_earlier_jobs_checkpoint_is_no_progress_of_this_one() -> None:
    status = lived("Evicted", words={"resumed_from_step": 40, "checkpoint_step": 40})
    assert (status.state, status.interruptions) == (State.FAILED, 5)


def test_a_checkpoint_behind_one_that_a_guard_gave_up_is_progress() -> None:
    def saved(checkpoint: int | None, resumed: int | None) -> AttemptRecord:
        return entry("Evicted").model_copy(update={"checkpoint_step": checkpoint, "resumed_from_step": resumed})

    assert saved_step([]) is None
    assert saved_step([entry("Evicted")]) is None
    assert saved_step([saved(50, 10)]) == 50
    assert saved_step([saved(50, 10), saved(30, 20)]) == 30, "the run went back behind step 50"
    assert saved_step([saved(50, 10), saved(None, 20)]) == 20
    assert saved_step([saved(50, 10), saved(None, None)]) == 50
    from_nothing = saved(None, None).model_copy(update={"step": 7})
    assert saved_step([saved(50, 10), from_nothing]) == -1, "the run went back to its beginning"
    assert saved_step([saved(50, 10), entry("RolledBack")]) == -1, "the run goes on from its beginning"


def test_a_gang_that_goes_back_to_the_beginning_has_no_checkpoint_any_more() -> None:
    world = World(a_job(PATIENT), outcomes=("Evicted", "RolledBack", "Evicted"), run_seconds=20)
    world.words = {"step": 15, "checkpoint_step": 10}
    world.run(lambda w: len(w.job.status.attempts) == 1)
    assert told(world.job.status, ConditionType.CHECKPOINTED) == "at step 10"
    world.run(lambda w: w.job.status.state == State.TRAINING)
    seen = progress(attempt=2, resumed_from_step=10, checkpoint_step=20)
    world.job = replace(world.job, status=world.job.status.model_copy(update={"progress": seen}))
    world.words = {}  # an agent leaves out what is not so
    world.run(lambda w: len(w.job.status.attempts) == 2)
    kept = world.job.status.attempts[-1]
    assert (kept.outcome, kept.step, kept.resumed_from_step, kept.checkpoint_step) == ("RolledBack", None, None, None)
    checkpointed = world.job.status.condition(ConditionType.CHECKPOINTED)
    assert checkpointed is not None
    assert (checkpointed.status, checkpointed.message) == ("False", "the run goes on from its beginning")
    world.words = {"step": 15, "checkpoint_step": 10}
    counted = world.job.status.model_copy(update={"interruptions_without_checkpoint": 3})
    world.job = replace(world.job, status=counted)
    world.run(lambda w: len(w.job.status.attempts) == 3)
    assert world.job.status.interruptions_without_checkpoint == 1, "a save at step 10 is progress again"
    assert told(world.job.status, ConditionType.CHECKPOINTED) == "at step 10"


def test_status_keeps_of_each_attempt_where_it_began_how_it_ended_and_what_it_saved() -> None:
    words = {"step": 80, "resumed_from_step": 20, "checkpoint_step": 60}
    status = lived("Hang", "Succeeded", words=words)
    first = status.attempts[0]
    assert (first.number, first.pool, first.outcome) == (1, "a100", "Hang")
    assert (first.resumed_from_step, first.step, first.checkpoint_step) == (20, 80, 60)
    assert parse_time(first.start_time) < parse_time(first.end_time)
    assert status.attempts[1].outcome == "Succeeded"


def test_what_no_pod_can_say_any_more_is_taken_from_the_progress() -> None:
    world = World(run_seconds=100)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    for _ in range(50):
        world.tick()
    spent = TimeSpent(start_seconds=5, train_seconds=30)
    said = progress(resumed_from_step=10, checkpoint_step=40, tokens_per_second=123.0, spent=spent)
    world.job = replace(world.job, status=world.job.status.model_copy(update={"progress": said}))
    world.delete_job("faq-0a1b2-1")
    world.run(lambda w: w.job.status.state == State.RETRYING)
    status = world.job.status
    [kept] = status.attempts
    assert (kept.outcome, kept.step, kept.resumed_from_step, kept.checkpoint_step) == ("AttemptDeleted", 50, 10, 40)
    assert kept.tokens_per_second == 123.0
    assert status.goodput is not None
    # 40 steps in 30 s, of which the last 10 were not saved
    assert (status.goodput.train_seconds, status.goodput.redo_seconds) == (23, 7)
    assert status.goodput.down_seconds >= 15


@pytest.mark.parametrize("seed", range(12))
def test_goodput_adds_up_in_every_life(seed: int) -> None:
    dice = random.Random(seed)
    names = ("Hang", "Evicted", "RolledBack", "Stopped", "CollectiveFailed", "Succeeded")
    words = {"step": 50, "checkpoint_step": dice.randint(0, 60), "spent": Spent(start=dice.randint(0, 9), train=9)}
    world = World(
        a_job(PATIENT), outcomes=(*dice.choices(names, k=5), "Succeeded"), run_seconds=dice.randint(5, 20), words=words
    )
    world.run(lambda w: w.job.status.state in (State.TRAINING, State.SUCCEEDED))
    suspended = 0
    if world.job.status.completion_time is None and dice.random() < 0.7:
        world.edit(suspend=True)
        world.run(lambda w: w.job.status.state == State.SUSPENDED)
        suspended = dice.randint(10, 90)
        for _ in range(suspended):
            world.tick()
            world.reconcile()
        world.edit(suspend=False)
    status = world.run_to_the_end().job.status
    found = status.goodput
    assert found is not None and found.until_time == status.completion_time
    wall = (parse_time(found.until_time) - parse_time(found.since_time)).total_seconds() - suspended
    assert abs(sum(parts(found).values()) - wall) <= 0.01 * wall


def test_goodput_adds_up_from_the_first_attempt_to_the_end() -> None:
    words = {"step": 80, "checkpoint_step": 50, "spent": Spent(start=2, train=8)}
    status = lived("Hang", "Evicted", "Succeeded", run_seconds=15, words=words)
    found = status.goodput
    assert found is not None and status.completion_time is not None
    assert found.until_time == status.completion_time
    assert found.since_time == "2026-11-22T12:00:03Z"
    wall = parse_time(found.until_time) - parse_time(found.since_time)
    assert sum(parts(found).values()) == wall.total_seconds()
    assert parts(found) | {"down": 0} == {
        "queue": 6,
        "start": 6,
        "train": 18,
        "evaluate": 0,
        "save": 0,
        "restore": 0,
        "redo": 6,
        "down": 0,
    }
    assert found.percent == 100 * 18 // wall.total_seconds()


def test_goodput_leaves_suspension_out_also_where_the_job_is_cancelled_meanwhile() -> None:
    world = World(run_seconds=100)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.edit(suspend=True)
    world.run(lambda w: w.job.status.state == State.SUSPENDED)
    before = world.job.status.goodput
    for _ in range(500):
        world.tick()
        world.reconcile()
    world.edit(cancel=True)
    world.run(lambda w: w.job.status.state == State.CANCELLED)
    after = world.job.status.goodput
    assert before is not None and after is not None
    assert sum(parts(after).values()) - sum(parts(before).values()) <= 5
    assert after.until_time == world.job.status.completion_time
    assert parse_time(after.until_time) > later(500)


def test_a_failed_job_tells_all_that_its_owner_needs_in_one_condition_and_one_event() -> None:
    status = lived("DataInvalid")
    for kind in (ConditionType.FAILED, ConditionType.STALLED):
        assert told(status, kind) == (
            "it was DataInvalid. What to do: Correct the rows that the message lists and apply the job again. "
            "Retried automatically: no. Runbook: docs/failures.md#datainvalid"
        )
    assert told(status, ConditionType.SUCCEEDED) == "it was DataInvalid"


def test_a_retry_is_told_with_its_time_and_its_cost() -> None:
    world = World(outcomes=("Hang", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    message = told(world.job.status, ConditionType.QUEUED)
    assert message == (
        f"it was Hang. Retried automatically: yes, at {world.job.status.next_attempt_time}; "
        "this was failure 1; Hang is retried at most 3×."
    )
