"""A job's life from the first sight to the end, and the same with the operator dying before any single operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.job import FineTuneJobSpec
from finetune_api.status import ConditionStatus, ConditionType, State
from tests.unit.operator.builders import a_job, a_pool, a_spec
from tests.unit.operator.world import World

TWO_NODES = a_spec(resources={"nodes": 2, "gpus": 1})

LIVES = {
    "succeeds at once": lambda: World(a_job(TWO_NODES)),
    "fails twice, then succeeds": lambda: World(outcomes=("Hang", "CollectiveFailed", "Succeeded")),
    "is evicted, then succeeds": lambda: World(outcomes=("Evicted", "Succeeded")),
    "fails for good": lambda: World(outcomes=("DataInvalid",)),
    "fails until the budget is spent": lambda: World(a_job(a_spec(retry={"maxFailures": 1})), outcomes=("Hang",)),
}


def story(world: World) -> tuple[object, ...]:
    """What a person would tell of the life afterwards."""
    status = world.job.status
    return (
        status.state,
        [record.outcome for record in status.attempts],
        [record.number for record in status.attempts],
        status.failures,
        status.interruptions,
        status.endings,
        status.artifacts,
        status.failure and status.failure.failure_class,
    )


@pytest.mark.parametrize("name", ["succeeds at once", "fails twice, then succeeds", "is evicted, then succeeds"])
def test_a_death_before_any_operation_changes_nothing_in_the_end(name: str) -> None:
    calm = LIVES[name]().run_to_the_end()
    assert calm.operations > 10
    for point in range(calm.operations):
        world = LIVES[name]()
        world.dies_before = point
        world.run_to_the_end()
        assert story(world) == story(calm), f"died before operation {point}"
        attempts = [job for job in world.released if "-p" not in job]
        assert len(attempts) == len(set(attempts)) == len(calm.job.status.attempts), f"operation {point}: {attempts}"


def test_no_two_status_writes_say_the_same() -> None:
    world = LIVES["fails twice, then succeeds"]().run_to_the_end()
    for before, after in zip(world.statuses, world.statuses[1:], strict=False):
        assert before != after


def test_the_first_write_shows_every_condition_as_unknown() -> None:
    world = World()
    world.reconcile()
    first = world.statuses[0]
    assert [condition.type for condition in first.conditions] == [kind.value for kind in ConditionType]
    unknown = {c.type for c in first.conditions if c.status == ConditionStatus.UNKNOWN}
    assert unknown == {kind.value for kind in ConditionType} - {"Reconciling"}
    assert first.observed_generation == 1


def test_a_transition_time_moves_only_when_the_status_does() -> None:
    world = LIVES["fails twice, then succeeds"]().run_to_the_end()
    for before, after in zip(world.statuses, world.statuses[1:], strict=False):
        for old, new in zip(before.conditions, after.conditions, strict=True):
            if old.status == new.status:
                assert old.last_transition_time == new.last_transition_time


def test_success_tells_where_the_result_is() -> None:
    status = LIVES["succeeds at once"]().run_to_the_end().job.status
    assert status.artifacts is not None
    assert status.artifacts.adapter == "s3://team-a/models/faq/adapter"
    assert status.artifacts.report == "s3://team-a/models/faq/report.md"
    assert status.failure is None
    truths = {c.type: c.status.value for c in status.conditions}
    assert truths == {
        "Validated": "True",
        "Planned": "True",
        "Queued": "False",
        "Scheduled": "False",
        "Training": "False",
        "Checkpointed": "Unknown",
        "Succeeded": "True",
        "Failed": "False",
        "Finished": "True",
        "Suspended": "False",
        "Reconciling": "False",
        "Stalled": "False",
    }


@pytest.mark.parametrize(
    ("fields", "adapter", "model"),
    [
        ({"tuning": {"type": "Full"}}, None, "model"),
        ({"tuning": {"type": "PromptTuning"}}, "adapter", None),
        ({"output": {"uri": "s3://team-a/models/faq", "mergeAdapter": True}}, "adapter", "merged"),
        ({"objective": {"type": "Evaluation"}, "tuning": None}, None, None),
    ],
)
def test_what_a_run_made_follows_from_its_method(
    fields: dict[str, Any], adapter: str | None, model: str | None
) -> None:
    document = {**a_spec(resources={"gpus": 8}).to_json(), **fields}
    spec = FineTuneJobSpec.from_json({name: value for name, value in document.items() if value is not None})
    status = World(a_job(spec), pools=(a_pool(gpuMemoryGiB=141),)).run_to_the_end().job.status
    assert status.state == State.SUCCEEDED, status.message
    assert status.artifacts is not None
    uri = "s3://team-a/models/faq"
    assert status.artifacts.adapter == (f"{uri}/{adapter}" if adapter else None)
    assert status.artifacts.model == (f"{uri}/{model}" if model else None)
    assert status.artifacts.report == f"{uri}/report.md"


def test_a_published_artifact_is_named() -> None:
    job = a_job(a_spec(output={"uri": "s3://team-a/models/faq", "publish": {"uri": "hf://team-a/faq"}}))
    artifacts = World(job).run_to_the_end().job.status.artifacts
    assert artifacts is not None and artifacts.published == "hf://team-a/faq"


def test_a_model_that_misses_a_requirement_fails_for_good_and_keeps_its_artifact() -> None:
    job = a_job(a_spec(evaluation={"require": [{"metric": "bleu", "min": 20}]}))
    status = World(job, outcomes=("RequirementNotMet",)).run_to_the_end().job.status
    assert status.state == State.FAILED
    assert [record.outcome for record in status.attempts] == ["RequirementNotMet"]
    assert status.failure is not None
    assert (status.failure.failure_class, status.failure.retriable) == ("RequirementNotMet", False)
    assert status.artifacts is not None
    assert status.artifacts.adapter == "s3://team-a/models/faq/adapter"
    other = World(a_job(), outcomes=("DataInvalid",)).run_to_the_end().job.status
    assert other.artifacts is None, "no other failure leaves an artifact"


def test_an_error_of_the_user_is_not_tried_again() -> None:
    status = LIVES["fails for good"]().run_to_the_end().job.status
    assert [record.outcome for record in status.attempts] == ["DataInvalid"]
    assert status.state == State.FAILED
    assert status.is_true(ConditionType.STALLED)
    assert status.failure is not None
    assert (status.failure.failure_class, status.failure.retriable) == ("DataInvalid", False)


def test_a_failure_of_the_platform_is_tried_again_until_the_budget_is_spent() -> None:
    status = LIVES["fails until the budget is spent"]().run_to_the_end().job.status
    assert [record.outcome for record in status.attempts] == ["Hang", "Hang"]
    assert status.failure is not None
    assert status.failure.message == "failed 2 times; the last: it was Hang"


def test_interruptions_do_not_count_but_five_without_a_checkpoint_end_the_job() -> None:
    status = World(outcomes=("Evicted",)).run_to_the_end().job.status
    assert status.failures is None
    assert status.interruptions == 5
    assert status.failure is not None
    assert status.failure.failure_class == "NoProgress"


def test_suspending_frees_all_pods_and_resuming_goes_on_with_the_next_number() -> None:
    world = World(a_job(TWO_NODES), run_seconds=30)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.edit(suspend=True)
    world.run(lambda w: w.job.status.state == State.SUSPENDED)
    assert world.pods == {} or all(pod.over for pod in world.pods.values())
    assert [record.outcome for record in world.job.status.attempts] == ["Suspended"]
    world.edit(suspend=False)
    world.run_to_the_end()
    assert [(r.number, r.outcome) for r in world.job.status.attempts] == [(1, "Suspended"), (2, "Succeeded")]


def test_a_death_while_suspending_and_resuming_changes_nothing_in_the_end() -> None:
    def live(dies_before: int | None) -> World:
        world = World(run_seconds=8, dies_before=dies_before)
        world.run(lambda w: w.job.status.state == State.TRAINING)
        world.edit(suspend=True)
        world.run(lambda w: w.job.status.state == State.SUSPENDED)
        world.edit(suspend=False)
        return world.run_to_the_end()

    for point in range(live(None).operations):
        attempts = [(r.number, r.outcome) for r in live(point).job.status.attempts]
        assert attempts == [(1, "Suspended"), (2, "Succeeded")], f"died before operation {point}"


def test_cancel_ends_the_job_for_good() -> None:
    world = World(run_seconds=30)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.edit(cancel=True)
    status = world.run_to_the_end().job.status
    assert status.state == State.CANCELLED
    assert status.is_true(ConditionType.FAILED)
    assert not status.is_true(ConditionType.STALLED)
    assert all(pod.over for pod in world.pods.values())


def test_a_job_deleted_by_somebody_is_an_interruption_and_its_number_is_not_used_again() -> None:
    world = World(run_seconds=30)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.delete_job(world.job.name + "-0a1b2-1")
    world.run_seconds = 3
    status = world.run_to_the_end().job.status
    assert [(r.number, r.outcome) for r in status.attempts] == [(1, "AttemptDeleted"), (2, "Succeeded")]
    assert (status.failures, status.interruptions) == (None, 1)


def test_the_deadline_does_not_count_suspension() -> None:
    world = World(a_job(a_spec(deadlineSeconds=20)), run_seconds=10_000)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.edit(suspend=True)
    world.run(lambda w: w.job.status.state == State.SUSPENDED)
    for _ in range(100):
        world.tick()
        world.reconcile()
    world.edit(suspend=False)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    status = world.run_to_the_end().job.status
    assert status.failure is not None
    assert status.failure.failure_class == "DeadlineExceeded"
    assert [record.outcome for record in status.attempts] == ["Suspended", "DeadlineExceeded"]
    assert (status.suspended_seconds or 0) >= 100


def test_finished_jobs_are_kept_for_their_logs_until_the_time_to_live_is_over() -> None:
    world = World().run_to_the_end()
    assert list(world.jobs) == ["faq-0a1b2-1"]
    world.edit(ttlSecondsAfterFinished=60)
    world.run(lambda w: not w.jobs)
    assert world.job.status.state == State.SUCCEEDED


def test_a_lost_plan_file_comes_back_with_the_same_digest() -> None:
    world = World(outcomes=("Hang", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    world.config_maps.clear()
    status = world.run_to_the_end().job.status
    assert status.state == State.SUCCEEDED
    assert len(world.config_maps) == 1


def test_a_plan_file_that_cannot_come_back_the_same_ends_a_job_that_has_run() -> None:
    world = World(outcomes=("Hang", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    world.config_maps.clear()
    world.pools = (a_pool("a100", gpusPerNode=8, gpuMemoryGiB=11),)  # a smaller micro batch now
    status = world.run_to_the_end().job.status
    assert status.state == State.FAILED
    assert status.failure is not None
    assert "planning again gives another run" in status.failure.message


def test_an_edited_plan_file_is_replaced_before_an_attempt_reads_it() -> None:
    world = World(outcomes=("Hang", "Succeeded"))
    world.run(lambda w: w.job.status.state == State.RETRYING)
    name, (uid, text) = next(iter(world.config_maps.items()))
    assert text is not None
    world.config_maps[name] = (uid, text.replace("falcon", "malice"))
    status = world.run_to_the_end().job.status
    assert status.state == State.SUCCEEDED
    assert world.config_maps[name][1] == text


def test_a_job_that_is_being_deleted_stops_its_attempt_and_starts_nothing() -> None:
    world = World(run_seconds=30)
    world.run(lambda w: w.job.status.state == State.TRAINING)
    world.job = replace(world.job, deleting=True)
    world.reconcile()
    assert world.jobs == {}
    created = len(world.created)
    for _ in range(10):
        world.tick()
        world.reconcile()
    assert len(world.created) == created
