"""fromJob: the artifact of an earlier job in place of a model's URI."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import NotFinished, build_references, named_jobs, resolve, with_resolved
from finetune_api.status import (
    Artifacts,
    Condition,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    Plan,
    ResolvedModel,
)
from tests.unit.api import values

BASE = {"model": {"uri": "hf://tiiuae/falcon-7b", "revision": "v1"}}
ADAPTER = Artifacts(uri="s3://b/o", adapter="s3://b/o/adapter", report="s3://b/o/report.md")
MERGED = ADAPTER.model_copy(update={"model": "s3://b/o/merged"})
WHOLE = Artifacts(uri="s3://b/o", model="s3://b/o/model", report="s3://b/o/report.md")


def follower(**changes: Any) -> FineTuneJobSpec:
    """A job that starts from the job `sft`."""
    return values.spec(**values.merge({"model": {"uri": None, "revision": None, "fromJob": "sft"}}, changes))


def status(
    artifacts: Artifacts | None, *true: ConditionType, planned: bool = True, **changes: Any
) -> FineTuneJobStatus:
    plan: Plan | None = values.plan(values.spec()).plan if planned else None
    conditions = [
        Condition(
            type=kind,
            status=ConditionStatus.TRUE,
            reason="Test",
            observed_generation=1,
            last_transition_time="2026-11-22T12:00:00Z",
        )
        for kind in true
    ]
    return FineTuneJobStatus(conditions=conditions, artifacts=artifacts, plan=plan, **changes)


def succeeded(artifacts: Artifacts | None = ADAPTER, **changes: Any) -> FineTuneJobStatus:
    return status(artifacts, ConditionType.SUCCEEDED, ConditionType.FINISHED, **changes)


def found(job: FineTuneJobSpec, earlier: FineTuneJobSpec, of: FineTuneJobStatus, path: str = "model") -> ResolvedModel:
    return resolve(job, path, (earlier, of))


def test_an_adapter_goes_on_on_its_own_base() -> None:
    resolved = found(follower(), values.spec(**BASE), succeeded())
    assert (resolved.uri, resolved.revision, resolved.adapter) == ("hf://tiiuae/falcon-7b", "v1", "s3://b/o/adapter")
    job = with_resolved(follower(), [resolved])
    references = build_references(job)
    assert (references.model.uri, references.model.revision) == ("hf://tiiuae/falcon-7b", "v1")
    assert references.adapter is not None and references.adapter.uri == "s3://b/o/adapter"
    run = values.plan(job).run
    assert (run.model.adapter, run.model.adapter_digest) == (references.adapter, "sha256:model.adapter.uri")
    assert {s["name"]: s["reason"] for s in run.settings}["model.uri"] == "from FineTuneJob sft"


def test_a_chain_of_adapters_keeps_the_first_base() -> None:
    second = follower()
    first = found(second, values.spec(**BASE), succeeded())
    third = found(follower(), second, succeeded(resolved=[first]))
    assert (third.uri, third.adapter) == ("hf://tiiuae/falcon-7b", "s3://b/o/adapter")


def test_a_whole_model_is_the_base_itself() -> None:
    resolved = found(follower(), values.spec(tuning={"type": "Full"}), succeeded(WHOLE))
    assert (resolved.uri, resolved.adapter) == ("s3://b/o/model", None)


@pytest.mark.parametrize(
    "changes", [{"tuning": {"type": "Full"}}, values.OBJECTIVES["Distillation"]], ids=["Full", "Distillation"]
)
def test_a_run_that_needs_a_whole_model_takes_the_merged_one(changes: dict[str, Any]) -> None:
    job = follower(**changes)
    assert found(job, values.spec(), succeeded(MERGED)).uri == "s3://b/o/merged"
    with pytest.raises(FinetuneError, match=r"made an adapter only; run it with output\.mergeAdapter: true") as caught:
        found(job, values.spec(), succeeded())
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.model.fromJob")


def test_the_task_of_the_earlier_job_is_kept_unless_one_is_written() -> None:
    classifier = values.spec(model={"task": "SequenceClassification"})
    resolved = found(follower(), classifier, succeeded())
    assert with_resolved(follower(), [resolved]).task == "SequenceClassification"
    assert with_resolved(follower(model={"task": "CausalLM"}), [resolved]).task == "CausalLM"


def test_teachers_and_reward_models_are_whole_models_of_earlier_jobs() -> None:
    job = values.spec(
        objective={
            "type": "GRPO",
            "grpo": {"rewards": [{"function": "ExactMatch"}, {"model": {"fromJob": "judge"}}]},
        }
    )
    path = "objective.grpo.rewards[1].model"
    assert named_jobs(job) == {path: "judge"}
    reward = values.spec(**values.OBJECTIVES["Reward"])
    resolved = found(job, reward, succeeded(MERGED), path)
    references = build_references(with_resolved(job, [resolved]))
    assert [item.uri if item else None for item in references.rewards] == [None, "s3://b/o/merged"]
    with pytest.raises(FinetuneError, match="made an adapter only"):
        found(job, reward, succeeded(), path)
    student = values.spec(objective={"type": "Distillation", "distillation": {"teacher": {"fromJob": "big"}}})
    path = "objective.distillation.teacher"
    assert named_jobs(student) == {path: "big"}
    taught = with_resolved(student, [found(student, values.spec(), succeeded(WHOLE), path)])
    teacher = build_references(taught).teacher
    assert teacher is not None and teacher.uri == "s3://b/o/model"


@pytest.mark.parametrize(
    ("earlier", "words"),
    [
        (None, "there is no FineTuneJob sft in this namespace"),
        ((values.spec(), status(None, planned=False)), "has not finished yet"),
        ((values.spec(), status(None)), "has not finished yet"),
        ((values.spec(), status(None, ConditionType.FINISHED, planned=False)), "has not finished yet"),
    ],
    ids=["missing", "fresh", "training", "invalid but may be mended"],
)
def test_an_artifact_that_may_still_come_is_waited_for(earlier: Any, words: str) -> None:
    with pytest.raises(NotFinished, match=words):
        resolve(follower(), "model", earlier)


@pytest.mark.parametrize(
    ("earlier", "words"),
    [
        ((values.spec(), status(None, ConditionType.FINISHED, ConditionType.FAILED)), "ended without success"),
        ((values.spec(**values.OBJECTIVES["Evaluation"]), succeeded(ADAPTER)), "made no model"),
        ((None, succeeded()), "made no model"),
        ((values.spec(), succeeded(None)), "made no model"),
    ],
    ids=["failed", "evaluation", "unreadable", "without artifacts"],
)
def test_an_artifact_that_will_never_come_is_an_error_of_the_field(earlier: Any, words: str) -> None:
    with pytest.raises(FinetuneError, match=words) as caught:
        resolve(follower(), "model", earlier)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.model.fromJob")
    assert str(caught.value).startswith("model.fromJob: FineTuneJob sft")


def test_a_resolution_of_another_job_is_not_used() -> None:
    resolved = found(follower(), values.spec(), succeeded())
    assert with_resolved(follower(model={"fromJob": "other"}), [resolved]).model.uri is None


def test_on_one_machine_the_uri_has_to_be_written() -> None:
    with pytest.raises(FinetuneError, match="resolved in a cluster only") as caught:
        build_references(follower(), local=True)
    assert caught.value.field == "spec.model.uri"
