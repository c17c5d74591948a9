"""A job that starts from the artifact of another one: it waits, goes on, and needs that job no more."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.job import FineTuneJobSpec
from finetune_api.status import ConditionStatus, ConditionType, State
from finetune_operator.decide import decide
from finetune_operator.snapshot import JobView
from tests.unit.operator.builders import CONFIG, a_job, a_spec
from tests.unit.operator.world import World

FOLLOWER = a_spec(model={"fromJob": "sft"})


def earlier(spec: FineTuneJobSpec | None = None, outcome: str = "Succeeded") -> JobView:
    """The job sft at its end."""
    output = {"uri": "s3://team-a/models/sft"}
    ended = World(a_job(spec or a_spec(output=output)), outcomes=(outcome,)).run_to_the_end().job
    return replace(ended, name="sft", uid="1f1f1f1f-0000-4000-8000-000000000001")


def waiting(*named: JobView) -> World:
    """The follower's world, as far as it gets by itself."""
    world = World(a_job(FOLLOWER), named_jobs=named)
    for _ in range(3):
        world.reconcile()
    return world


def test_a_job_that_does_not_exist_is_waited_for_and_the_message_says_so() -> None:
    world = waiting()
    status = world.job.status
    assert status.state == State.PENDING
    validated = status.condition(ConditionType.VALIDATED)
    assert validated is not None
    assert (validated.status, validated.reason) == (ConditionStatus.UNKNOWN, "WaitingForJob")
    assert "there is no FineTuneJob sft in this namespace" in validated.message
    assert (status.message or "").startswith("waits: model.fromJob")
    assert world.created == []
    assert decide(world.snapshot(), CONFIG).look_again == 15.0, "nobody is woken when the other job ends"


def test_a_job_that_is_not_finished_is_waited_for() -> None:
    running = replace(earlier(), status=World(a_job()).job.status)
    status = waiting(running).job.status
    assert "FineTuneJob sft has not finished yet" in (status.message or "")
    assert not status.is_true(ConditionType.FINISHED)


def test_once_it_has_succeeded_the_run_goes_on_from_its_adapter() -> None:
    world = waiting()
    world.named_jobs = (earlier(),)
    status = world.run_to_the_end().job.status
    assert status.state == State.SUCCEEDED
    assert [(item.field, item.job, item.uri, item.adapter) for item in status.resolved] == [
        ("model", "sft", "hf://tiiuae/falcon-7b", "s3://team-a/models/sft/adapter")
    ]
    _, text = next(iter(world.config_maps.values()))
    assert text is not None
    assert "s3://team-a/models/sft/adapter" in text and "hf://tiiuae/falcon-7b" in text


def test_a_run_that_is_resolved_does_not_need_the_earlier_job_any_more() -> None:
    world = World(a_job(FOLLOWER), named_jobs=(earlier(),), outcomes=("Hang", "Succeeded"))
    world.run(lambda w: bool(w.job.status.resolved))
    world.named_jobs = ()
    assert world.run_to_the_end().job.status.state == State.SUCCEEDED


def test_a_job_that_failed_is_an_error_of_the_field() -> None:
    status = waiting(earlier(outcome="DataInvalid")).job.status
    assert status.state == State.INVALID
    assert status.failure is not None
    assert (status.failure.failure_class, status.failure.field) == ("InvalidSpec", "spec.model.fromJob")
    assert "ended without success" in status.failure.message


def test_a_job_cannot_start_from_itself() -> None:
    world = World(a_job(a_spec(model={"fromJob": "faq"})))
    for _ in range(3):
        world.reconcile()
    failure = world.job.status.failure
    assert failure is not None and "names the job itself" in failure.message


def test_a_new_generation_looks_at_the_named_job_anew() -> None:
    world = World(a_job(FOLLOWER), named_jobs=(earlier(),))
    world.run(lambda w: bool(w.job.status.resolved))
    world.named_jobs = ()
    world.edit(model={"fromJob": "other"})
    world.reconcile()
    status = world.job.status
    assert status.resolved == []
    assert "there is no FineTuneJob other" in (status.message or "")
