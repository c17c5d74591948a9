"""Resolved settings: each has one value and one reason, and what the job sets wins."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import TuningType
from finetune_api.planner import unsupported
from finetune_api.planner.ledger import SET_BY_JOB
from tests.unit.api import values


def settings(job: Any, **options: Any) -> dict[str, tuple[Any, str]]:
    """The plan's settings by name."""
    return {item.name: (item.value, item.reason) for item in values.plan(job, **options).plan.settings}


KINDS = [
    *(values.OBJECTIVES["Supervised"] | {"tuning": {"type": kind}} for kind in TuningType),
    *(changes for kind, changes in values.OBJECTIVES.items() if kind != "Supervised"),
]


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: str(changes)[:70])
def test_every_setting_is_recorded_once_with_a_reason(changes: dict[str, Any]) -> None:
    recorded = values.plan(values.spec(**changes), model=values.small_model()).plan.settings
    assert [name for name, count in Counter(item.name for item in recorded).items() if count > 1] == []
    assert [item.name for item in recorded if not item.reason] == []
    written = {"objective.type", "objective.ppo.rewards[0].function", "objective.grpo.rewards[0].function"}
    assert {item.name for item in recorded if item.reason == SET_BY_JOB} <= written, "nothing else was set by the job"


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
    "hyperparameters.packing": {"hyperparameters": {"packing": True}},
    "hyperparameters.groupByLength": {"hyperparameters": {"groupByLength": True}},
    "hyperparameters.neftuneAlpha": {"hyperparameters": {"neftuneAlpha": 5.0}},
    "hyperparameters.compile": {"hyperparameters": {"compile": True}},
    "hyperparameters.liger": {"hyperparameters": {"liger": True}},
    "hyperparameters.earlyStopping.patience": {"hyperparameters": {"earlyStopping": {"patience": 2}}},
    "hyperparameters.masterWeights": {"tuning": {"type": "Full"}, "hyperparameters": {"masterWeights": "BF16"}},
    "model.attention": {"model": {"attention": "Eager"}},
    "model.tokenizer.addSpecialTokens": {"model": {"tokenizer": {"addSpecialTokens": ["<a>"]}}},
    "dataset.maxSourceTokens": {"dataset": {"maxSourceTokens": 64}},
    "dataset.maxBadShare": {"dataset": {"maxBadShare": 0.25}},
    "dataset.test.fraction": {"dataset": {"test": {"fraction": 0.25}}},
    "evaluation.maxGenerated": {"evaluation": {"maxGenerated": 3, "metrics": ["bleu"]}},
    "evaluation.metrics": {"evaluation": {"metrics": ["bleu"]}},
    "checkpoint.keepBest": {"checkpoint": {"keepBest": 2}},
    "checkpoint.bestMetric": {"checkpoint": {"bestMetric": "tokenAccuracy"}},
    "output.mergeAdapter": {"output": {"mergeAdapter": True}},
    "output.maxShardSizeGiB": {"output": {"maxShardSizeGiB": 2.0}},
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
    model = values.model_facts(1_000_000_000)
    assert settings(values.spec(**GIVEN[name]), model=model)[name] == (value, SET_BY_JOB)


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


# objective, tuning, further changes, learning rate
RATES = [
    ("Supervised", "Full", {}, 2e-5),
    ("Supervised", "LoRA", {}, 2e-4),
    ("Supervised", "IA3", {}, 8e-3),
    ("Supervised", "PromptTuning", {}, 3e-2),
    ("Supervised", "Full", {"model": {"task": "SequenceClassification"}}, 2e-5),
    ("Supervised", "Full", {"model": {"task": "TokenClassification"}}, 5e-5),
    ("Supervised", "Full", {"model": {"task": "Seq2Seq"}}, 1e-4),
    ("Pretrain", "Full", {}, 3e-4),
    ("Distillation", "Full", {}, 5e-5),
    ("Reward", "Full", {}, 1e-5),
    ("DPO", "Full", {}, 5e-7),
    ("DPO", "LoRA", {}, 5e-6),
    ("ORPO", "LoRA", {}, 5e-5),
    ("KTO", "LoRA", {}, 5e-6),
    ("PPO", "LoRA", {}, 1e-5),
    ("GRPO", "Full", {}, 1e-6),
]


@pytest.mark.parametrize(("objective", "tuning", "more", "rate"), RATES)
def test_each_method_has_a_learning_rate_of_its_own(
    objective: str, tuning: str, more: dict[str, Any], rate: float
) -> None:
    changes = values.merge(values.merge(values.OBJECTIVES[objective], {"tuning": {"type": tuning}}), more)
    assert values.plan(values.spec(**changes), model=values.small_model()).run.hyperparameters.learning_rate == rate


PAPERS: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 0.1, "labelSmoothing": 0.0},
    "ORPO": {"beta": 0.1},
    "KTO": {"beta": 0.1, "desirableWeight": 1.0, "undesirableWeight": 1.0},
    "Distillation": {"temperature": 2.0, "alpha": 0.5, "quantizeTeacher": False},
    "PPO": {
        "beta": 0.05,
        "clipRange": 0.2,
        "iterations": 4,
        "discount": 1.0,
        "gaeLambda": 0.95,
        "valueCoefficient": 0.1,
        "temperature": 1.0,
        "maxNewTokens": 256,
    },
    "GRPO": {"beta": 0.04, "clipRange": 0.2, "iterations": 1, "generations": 8},
}


@pytest.mark.parametrize("kind", PAPERS)
def test_an_objective_starts_from_its_paper(kind: str) -> None:
    recorded = settings(values.spec(**values.OBJECTIVES[kind]), model=values.small_model())
    path = f"objective.{kind.lower()}"
    found = {name.removeprefix(f"{path}."): value for name, (value, _) in recorded.items() if name.startswith(path)}
    assert {name: found[name] for name in PAPERS[kind]} == PAPERS[kind]
    run = values.plan(values.spec(**values.OBJECTIVES[kind]), model=values.small_model()).run.objective.to_json()
    member = {"Distillation": "distillation", "PPO": "reinforcement", "GRPO": "reinforcement"}.get(kind, "preference")
    assert PAPERS[kind].items() <= run[member].items(), "what is recorded is what the trainer reads"
    assert set(run) == {"type", member}


def test_an_evaluation_takes_no_step_and_holds_nothing_out() -> None:
    planned = values.plan(values.spec(**values.OBJECTIVES["Evaluation"]))
    run = planned.run
    assert (run.hyperparameters.total_steps, planned.plan.total_steps) == (0, 0)
    assert (run.dataset.validation_fraction, run.evaluation.every_steps) == (None, None)
    assert run.tuning.to_json() == {"type": "Full"}
    quantised = values.spec(objective={"type": "Evaluation"}, tuning={"type": "QLoRA", "quantization": {"bits": 8}})
    loaded = values.plan(quantised).run.tuning
    assert (loaded.type, loaded.lora) == ("Full", None)
    assert loaded.quantization is not None and loaded.quantization.type == "Int8"


def test_text_is_pretrained_in_full_blocks() -> None:
    text = values.data_facts(rows=1, format="Text", tokens=1_000_000, longest_tokens=1_000_000)
    run = values.plan(values.spec(**values.OBJECTIVES["Pretrain"]), model=values.small_model(), data=text).run
    assert run.hyperparameters.packing is True
    assert run.dataset.validation_fraction == 0.1, "a single book is split too"
    pretrain = run.objective.pretrain
    assert pretrain is not None and pretrain.block_size == run.hyperparameters.max_sequence_length == 2048
    assert run.hyperparameters.total_steps == math.ceil(math.ceil(900_000 / 2048) / run.global_batch_size)
    character = values.merge(
        values.OBJECTIVES["Pretrain"], {"objective": {"pretrain": {"tokenizer": "Character", "blockSize": 256}}}
    )
    run = values.plan(values.spec(**character), model=values.small_model(), data=text).run
    pretrain = run.objective.pretrain
    assert pretrain is not None and (pretrain.random_windows, pretrain.block_size) == (True, 256)
    assert (run.hyperparameters.packing, run.hyperparameters.max_sequence_length) == (False, 256)


@pytest.mark.parametrize(
    ("task", "data_format", "noised"),
    [
        ("MaskedLM", "Text", True),
        ("Seq2Seq", "Text", True),
        ("Seq2Seq", "PromptCompletion", False),
        ("CausalLM", "Text", False),
    ],
)
def test_plain_text_of_masked_and_seq2seq_models_has_hidden_tokens(task: str, data_format: str, noised: bool) -> None:
    job = values.spec(model={"task": task}, tuning={"type": "Full"})
    run = values.plan(job, model=values.small_model(), data=values.data_facts(format=data_format)).run
    assert (run.objective.pretrain is not None) == noised
    if run.objective.pretrain is not None:
        assert (run.objective.pretrain.mask_probability, run.objective.pretrain.mean_span_length) == (0.15, 3.0)


def test_generated_tokens_count_for_the_sequence_and_iterations_for_the_steps() -> None:
    job = values.spec(
        objective={"type": "PPO", "ppo": {**values.REWARDS, "maxNewTokens": 100, "iterations": 3}},
        hyperparameters={"epochs": 1, "globalBatchSize": 10},
        dataset={"validation": {"fraction": 0.1}},
    )
    run = values.plan(job, model=values.small_model(), data=values.data_facts(rows=100)).run.hyperparameters
    assert run.max_sequence_length == 304, "200 + 100, in steps of 8"
    assert run.total_steps == 9 * 3


def test_a_model_that_cannot_be_packed_is_planned_without_and_counts_its_records() -> None:
    job = values.spec(hyperparameters={"packing": True, "epochs": 1, "globalBatchSize": 10}, tuning={"type": "LoRA"})
    data = values.data_facts(rows=1000)
    falcon, bloom = (
        values.plan(job, model=values.small_model(model_type=kind), data=data) for kind in ("falcon", "bloom")
    )
    assert falcon.run.hyperparameters.packing and not bloom.run.hyperparameters.packing
    held_out = 1 - (bloom.run.dataset.validation_fraction or 0)
    assert falcon.run.hyperparameters.total_steps < bloom.run.hyperparameters.total_steps == round(1000 * held_out / 10)
    [setting] = [found for found in bloom.plan.settings if found.name == "hyperparameters.packing"]
    assert (setting.value, "would see one another in a bloom model" in setting.reason) == (False, True)


def test_a_metric_for_the_best_step_keeps_the_best_one_and_has_to_be_measured() -> None:
    job = values.spec(checkpoint={"bestMetric": "tokenAccuracy"})
    kept = values.plan(job).run.checkpoint
    assert (kept.keep_best, kept.best_metric) == (1, "tokenAccuracy")
    assert "checkpoint.bestMetric" not in settings(values.spec())
    assert settings(values.spec(checkpoint={"keepBest": 1}))["checkpoint.bestMetric"][0] == "loss"
    for checkpoint, match in (
        ({"bestMetric": "perplexity"}, "No step can be the best by 'perplexity'.*measure loss, tokenAccuracy"),
        ({"bestMetric": "bleu"}, "No step can be the best by 'bleu'"),
        ({"bestMetric": "tokenAccuracy", "keepBest": 0}, "keepBest: 0 keeps none"),
    ):
        [refused] = unsupported(values.spec(checkpoint=checkpoint))
        assert refused.field == "spec.checkpoint.bestMetric"
        assert re.search(match, refused.message)
    with pytest.raises(FinetuneError, match="compares evaluations") as caught:
        values.plan(job, data=values.data_facts(rows=10))
    assert caught.value.field == "spec.checkpoint.bestMetric"


def test_early_stopping_keeps_the_best_and_needs_something_to_look_at() -> None:
    job = values.spec(hyperparameters={"earlyStopping": {"patience": 2}})
    assert values.plan(job).run.checkpoint.keep_best == 1
    with pytest.raises(FinetuneError, match="compares evaluations and nothing is held out") as caught:
        values.plan(job, data=values.data_facts(rows=10))
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.hyperparameters.earlyStopping")


def test_held_out_records_of_both_kinds_are_taken_from_the_training_rows() -> None:
    job = values.spec(
        dataset={"validation": {"fraction": 0.1}, "test": {"fraction": 0.2}},
        hyperparameters={"epochs": 1, "globalBatchSize": 1},
    )
    assert values.plan(job, data=values.data_facts(rows=100)).run.hyperparameters.total_steps == 70
    with pytest.raises(FinetuneError, match="leave nothing to train on"):
        values.plan(values.spec(dataset={"validation": {"fraction": 0.5}, "test": {"fraction": 0.5}}))
