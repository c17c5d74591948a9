"""Resolved settings: each has one value and one reason, and what the job sets wins."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from finetune_api.planner.ledger import SET_BY_JOB
from tests.unit.api import values


def settings(job: Any, **options: Any) -> dict[str, tuple[Any, str]]:
    """The plan's settings by name."""
    return {item.name: (item.value, item.reason) for item in values.plan(job, **options).plan.settings}


@pytest.mark.parametrize("kind", ["Full", "LoRA", "QLoRA"])
def test_every_setting_is_recorded_once_with_a_reason(kind: str) -> None:
    job = values.spec(tuning={"type": kind})
    recorded = values.plan(job, model=values.small_model()).plan.settings
    assert [name for name, count in Counter(item.name for item in recorded).items() if count > 1] == []
    assert [item.name for item in recorded if not item.reason] == []
    assert not [item for item in recorded if item.reason == SET_BY_JOB], "nothing was set by the job"


GIVEN: dict[str, dict[str, Any]] = {
    "hyperparameters.learningRate": {"hyperparameters": {"learningRate": 3e-4}},
    "hyperparameters.schedule": {"hyperparameters": {"schedule": "Linear"}},
    "hyperparameters.warmupRatio": {"hyperparameters": {"warmupRatio": 0.0}},
    "hyperparameters.weightDecay": {"hyperparameters": {"weightDecay": 0.5}},
    "hyperparameters.optimizer": {"hyperparameters": {"optimizer": "AdamW"}},
    "hyperparameters.precision": {"hyperparameters": {"precision": "FP16"}},
    "hyperparameters.maxGradNorm": {"hyperparameters": {"maxGradNorm": 0.3}},
    "hyperparameters.seed": {"hyperparameters": {"seed": 0}},
    "hyperparameters.gradientCheckpointing": {"hyperparameters": {"gradientCheckpointing": False}},
    "hyperparameters.maxSequenceLength": {"hyperparameters": {"maxSequenceLength": 128}},
    "hyperparameters.globalBatchSize": {"hyperparameters": {"globalBatchSize": 12}},
    "hyperparameters.microBatchSize": {"hyperparameters": {"microBatchSize": 2}},
    "hyperparameters.epochs": {"hyperparameters": {"epochs": 1.5}},
    "hyperparameters.maxSteps": {"hyperparameters": {"maxSteps": 7}},
    "hyperparameters.zeroStage": {"hyperparameters": {"zeroStage": 0}},
    "model.attention": {"model": {"attention": "Eager"}},
    "tuning.lora.rank": {"tuning": {"lora": {"rank": 8}}},
    "tuning.lora.alpha": {"tuning": {"lora": {"alpha": 32.0}}},
    "tuning.lora.dropout": {"tuning": {"lora": {"dropout": 0.0}}},
    "tuning.lora.targetModules": {"tuning": {"lora": {"targetModules": ["query_key_value"]}}},
    "tuning.lora.bias": {"tuning": {"lora": {"bias": "All"}}},
    "tuning.quantization.doubleQuant": {"tuning": {"quantization": {"doubleQuant": False}}},
    "tuning.quantization.computeType": {"tuning": {"quantization": {"computeType": "FP32"}}},
    "dataset.lossOn": {"dataset": {"lossOn": "All"}},
    "dataset.truncation": {"dataset": {"truncation": "Error"}},
    "dataset.validation.fraction": {"dataset": {"validation": {"fraction": 0.25}}},
    "evaluation.everySteps": {"evaluation": {"everySteps": 3}},
    "evaluation.generation.maxNewTokens": {"evaluation": {"generation": {"maxNewTokens": 200}}},
    "evaluation.generation.doSample": {"evaluation": {"generation": {"doSample": True}}},
    "checkpoint.everyMinutes": {"checkpoint": {"everyMinutes": 1.0}},
    "checkpoint.everySteps": {"checkpoint": {"everySteps": 5}},
    "checkpoint.keepLast": {"checkpoint": {"keepLast": 9}},
    "output.onExisting": {"output": {"onExisting": "Resume"}},
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_the_job_sets_is_used_as_it_is_even_zero_and_false(name: str) -> None:
    value: Any = GIVEN[name]
    for part in name.split("."):
        value = value[part]
    assert settings(values.spec(**GIVEN[name]))[name] == (value, SET_BY_JOB)


def test_defaults_depend_on_the_method() -> None:
    small = values.small_model()
    full = settings(values.spec(tuning={"type": "Full"}), model=small)
    lora = settings(values.spec(tuning={"type": "LoRA"}), model=small)
    qlora = settings(values.spec(), model=small)
    name = "hyperparameters.learningRate"
    assert (full[name][0], lora[name][0], qlora[name][0]) == (2e-5, 2e-4, 2e-4)
    name = "hyperparameters.optimizer"
    assert (full[name][0], lora[name][0], qlora[name][0]) == ("AdamW", "AdamW", "PagedAdamW8bit")
    assert "tuning.lora.rank" not in full and lora["tuning.lora.alpha"][0] == 2 * lora["tuning.lora.rank"][0]
    assert "tuning.quantization.bits" not in lora and qlora["tuning.quantization.type"][0] == "NF4"


def test_a_cpu_pool_computes_in_fp32_and_a_gpu_pool_in_bf16() -> None:
    job = values.spec(tuning={"type": "LoRA"})
    on_cpu = values.plan(job, values.cpu_pool(), model=values.small_model()).run
    on_gpu = values.plan(job, values.L4, model=values.small_model()).run
    assert (on_cpu.hyperparameters.precision, on_gpu.hyperparameters.precision) == ("FP32", "BF16")
    assert on_cpu.hyperparameters.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("longest", "positions", "length"),
    [(200, 2048, 200), (201, 2048, 208), (3, 2048, 8), (5000, 8192, 2048), (5000, 1024, 1024), (900, None, 904)],
)
def test_the_sequence_length_covers_the_longest_record_within_bounds(
    longest: int, positions: int | None, length: int
) -> None:
    planned = values.plan(
        values.spec(),
        model=values.small_model(max_positions=positions),
        data=values.data_facts(longest_tokens=longest),
    )
    assert planned.run.hyperparameters.max_sequence_length == length


def test_plain_text_counts_every_token_and_answers_count_alone() -> None:
    assert values.plan(values.spec(), data=values.data_facts(format="Text")).run.dataset.loss_on == "All"
    assert values.plan(values.spec(), data=values.data_facts(format="Messages")).run.dataset.loss_on == "Completion"


@pytest.mark.parametrize(("rows", "fraction"), [(19, None), (20, 0.1), (1000, 0.1)])
def test_a_tenth_is_held_out_where_there_are_enough_records(rows: int, fraction: float | None) -> None:
    planned = values.plan(values.spec(), data=values.data_facts(rows=rows))
    assert planned.run.dataset.validation_fraction == fraction
    reasons = {item.name: item.reason for item in planned.plan.settings}
    if fraction is None:
        assert reasons["dataset.validation"] == "19 records are too few to hold some out"
        assert planned.run.evaluation.every_steps is None


def test_a_validation_source_of_its_own_leaves_the_training_data_whole() -> None:
    job = values.spec(dataset={"validation": {"source": {"uri": "s3://team-a/faq/validation.jsonl"}}})
    run = values.plan(job).run
    assert run.dataset.validation_fraction is None
    assert run.dataset.validation is not None and run.dataset.validation.uri == "s3://team-a/faq/validation.jsonl"
    assert run.evaluation.every_steps is not None


def test_steps_or_minutes_decide_when_to_save() -> None:
    assert values.plan(values.spec()).run.checkpoint.every_minutes == 10.0
    by_steps = values.plan(values.spec(checkpoint={"everySteps": 5})).run.checkpoint
    assert (by_steps.every_steps, by_steps.every_minutes) == (5, None)
    both = values.plan(values.spec(checkpoint={"everySteps": 5, "everyMinutes": 2}))
    assert (both.run.checkpoint.every_steps, both.run.checkpoint.every_minutes) == (5, 2.0)
    recorded = {item.name: item.value for item in both.plan.settings if item.name.startswith("checkpoint.every")}
    assert recorded == {"checkpoint.everySteps": 5, "checkpoint.everyMinutes": 2.0}
