"""What the spec alone shows to be impossible is refused by name, with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
import regex

from finetune_api.crd import structural
from finetune_api.failures import FinetuneError
from finetune_api.job import FineTuneJobSpec, TuningType
from finetune_api.planner import unsupported
from finetune_api.planner.support import CHOICES, NOT_YET
from finetune_api.planner.unused import TRAINING_ONLY
from tests.unit.api import values

S3 = {"uri": "s3://b/place"}
ADAPTER = {"adapter": {"uri": "s3://b/adapter"}}

REFUSED: dict[str, dict[str, Any]] = {
    "spec.model.revision": {"model": {"uri": "s3://b/model", "revision": "v1"}},
    "spec.model.attention": {"model": {"attention": "Flash"}},
    "spec.model.cache": {"model": {"cache": {"claimName": "models"}}},
    "spec.model.adapter.revision": {"model": {"adapter": {"uri": "s3://b/adapter", "revision": "v1"}}},
    "spec.model.adapter": {"model": ADAPTER, "tuning": {"type": "Full"}},
    "spec.model.task": {"objective": {"type": "DPO"}, "model": {"task": "Seq2Seq"}},
    "spec.model.tokenizer.addSpecialTokens": {
        "model": {"tokenizer": {"addSpecialTokens": ["<a>"]}},
        "tuning": {"type": "IA3"},
    },
    "spec.dataset.sources[1].config": {
        "dataset": {"sources": [{"uri": "s3://b/one.jsonl"}, {"uri": "s3://b/two.jsonl", "config": "en"}]}
    },
    "spec.dataset.sources[0].split": {"dataset": {"sources": [{"uri": "s3://b/one.jsonl", "split": "test"}]}},
    "spec.dataset.sources[0].revision": {"dataset": {"sources": [{"uri": "s3://b/one.jsonl", "revision": "v1"}]}},
    "spec.dataset.validation.source.split": {"dataset": {"validation": {"source": {**S3, "split": "test"}}}},
    "spec.dataset.validation.source.weight": {"dataset": {"validation": {"source": {**S3, "weight": 2}}}},
    "spec.dataset.test.source.weight": {"dataset": {"test": {"source": {**S3, "weight": 2}}}},
    "spec.dataset.lossOn": {"model": {"task": "SequenceClassification"}, "dataset": {"lossOn": "All"}},
    "spec.dataset.balanceLabels": {"dataset": {"balanceLabels": True}},
    "spec.dataset.maxSourceTokens": {"objective": {"type": "ORPO"}, "dataset": {"maxSourceTokens": 64}},
    "spec.dataset.maxTargetTokens": {"dataset": {"format": "Text", "maxTargetTokens": 64}},
    "spec.objective.distillation.teacher.revision": {
        "objective": {"type": "Distillation", "distillation": {"teacher": {**S3, "revision": "v1"}}}
    },
    "spec.objective.grpo.rewards[0].model.revision": {
        "objective": {"type": "GRPO", "grpo": {"rewards": [{"model": {**S3, "revision": "v1"}}]}}
    },
    "spec.objective.ppo.rewards[1].pattern": {
        "objective": {
            "type": "PPO",
            "ppo": {"rewards": [{"function": "ExactMatch"}, {"function": "RegularExpression", "pattern": "(yes|no"}]},
        }
    },
    "spec.objective.pretrain": {"objective": {"type": "Supervised", "pretrain": {"maskProbability": 0.2}}},
    "spec.objective.pretrain.tokenizer": {
        "objective": {"type": "Supervised", "pretrain": {"tokenizer": "Character"}},
        "model": {"task": "MaskedLM"},
    },
    "spec.objective.pretrain.vocabularySize": {
        "objective": {"type": "Pretrain", "pretrain": {"tokenizer": "BytePair", "vocabularySize": 258}},
        "tuning": {"type": "Full"},
    },
    "spec.objective.pretrain.maskProbability": {
        "objective": {"type": "Pretrain", "pretrain": {"maskProbability": 0.2}},
        "tuning": {"type": "Full"},
    },
    "spec.objective.pretrain.meanSpanLength": {
        "objective": {"type": "Pretrain", "pretrain": {"meanSpanLength": 2}},
        "model": {"task": "MaskedLM"},
        "tuning": {"type": "Full"},
    },
    "spec.objective.pretrain.blockSize": {
        "objective": {"type": "Pretrain", "pretrain": {"blockSize": 64}},
        "tuning": {"type": "Full"},
        "hyperparameters": {"maxSequenceLength": 128},
    },
    "spec.tuning": {"tuning": None},
    "spec.tuning.type": {"objective": {"type": "Pretrain"}},
    "spec.tuning.softPrompt.projection": {"tuning": {"type": "PTuning", "softPrompt": {"projection": True}}},
    "spec.tuning.softPrompt.initText": {
        "tuning": {"type": "PrefixTuning", "softPrompt": {"init": "Text", "initText": "Classify:"}}
    },
    "spec.tuning.quantization.doubleQuant": {"tuning": {"quantization": {"type": "Int8", "doubleQuant": True}}},
    "spec.tuning.ia3.feedforwardModules": {
        "tuning": {"type": "IA3", "ia3": {"targetModules": ["a"], "feedforwardModules": ["b"]}}
    },
    "spec.hyperparameters.packing": {"tuning": {"type": "PTuning"}, "hyperparameters": {"packing": True}},
    "spec.hyperparameters.globalBatchSize": {
        "objective": {"type": "KTO"},
        "hyperparameters": {"globalBatchSize": 1},
    },
    "spec.hyperparameters.groupByLength": {"hyperparameters": {"packing": True, "groupByLength": True}},
    "spec.hyperparameters.gradientCheckpointing": {
        "tuning": {"type": "PrefixTuning"},
        "hyperparameters": {"gradientCheckpointing": True},
    },
    "spec.hyperparameters.masterWeights": {"hyperparameters": {"masterWeights": "BF16"}},
    "spec.hyperparameters.learningRate": {
        **values.OBJECTIVES["Evaluation"],
        "hyperparameters": {"learningRate": 1e-4},
    },
    "spec.hyperparameters.neftuneAlpha": {"objective": {"type": "KTO"}, "hyperparameters": {"neftuneAlpha": 5.0}},
    "spec.hyperparameters.routerLossWeight": {
        "model": {"task": "TokenClassification"},
        "hyperparameters": {"routerLossWeight": 0.01},
    },
    "spec.evaluation.probes": {"objective": {"type": "Reward"}, "evaluation": {"probes": ["Hello"]}},
    "spec.evaluation.generation": {
        "model": {"task": "SequenceClassification"},
        "evaluation": {"generation": {"maxNewTokens": 8}},
    },
    "spec.evaluation.maxGenerated": {"evaluation": {"maxGenerated": 8}},
    "spec.evaluation.generation.temperature": {"evaluation": {"generation": {"temperature": 0.7}}},
    "spec.evaluation.generation.topK": {"evaluation": {"generation": {"doSample": False, "topK": 50}}},
    "spec.evaluation.metrics[0]": {"evaluation": {"metrics": ["blue"]}},
    "spec.evaluation.require[0].metric": {"evaluation": {"require": [{"metric": "beauty", "min": 1}]}},
    "spec.evaluation.retention": {"evaluation": {"retention": S3}, "model": {"task": "Seq2Seq"}},
    "spec.evaluation.benchmarks": {
        "evaluation": {"benchmarks": [{"name": "ArcEasy", "source": S3}]},
        "objective": {"type": "Reward"},
    },
    "spec.evaluation.retention.split": {"evaluation": {"retention": {**S3, "split": "test"}}},
    "spec.evaluation.benchmarks[0].source.config": {
        "evaluation": {"benchmarks": [{"name": "ArcEasy", "source": {**S3, "config": "en"}}]}
    },
    "spec.output.mergeAdapter": {"tuning": {"type": "Full"}, "output": {"mergeAdapter": True}},
    "spec.queueName": {"queueName": "team-a"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_that_cannot_be_honoured_is_refused_by_its_path(field: str) -> None:
    found = unsupported(values.spec(**REFUSED[field]))
    assert [item.field for item in found] == [field]
    assert found[0].message.startswith(field.removeprefix("spec."))
    # The message says what to do instead.
    assert any(word in found[0].message for word in ("remove", "choose", "set ", "It can measure")), found[0].message


def test_the_planner_names_every_refused_field_at_once() -> None:
    bad = values.spec(queueName="q", model={"attention": "Flash"}, hyperparameters={"masterWeights": "BF16"})
    with pytest.raises(FinetuneError) as caught:
        values.plan(bad)
    assert caught.value.failure_class == "UnsupportedField"
    assert caught.value.field == "spec.model.attention"
    for name in ("model.attention", "hyperparameters.masterWeights", "queueName"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hyperparameters": {"zeroStage": 2}, "resources": {"nodes": 2}}, "spec.hyperparameters.zeroStage"),
        ({"hyperparameters": {"zeroStage": 3}}, "spec.hyperparameters.zeroStage"),
        ({"hyperparameters": {"zeroStage": 1, "optimizer": "Lion"}}, "spec.hyperparameters.optimizer"),
        (
            {"tuning": {"type": "Full"}, "hyperparameters": {"zeroStage": 2, "masterWeights": "BF16"}},
            "spec.hyperparameters.masterWeights",
        ),
        ({"objective": {"type": "Reward"}, "model": ADAPTER}, "spec.model.adapter"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes: dict[str, Any], field: str) -> None:
    assert [item.field for item in unsupported(values.spec(**changes))] == [field]


def test_the_smallest_job_and_one_with_plain_settings_are_accepted() -> None:
    assert unsupported(values.spec()) == []
    hub = {"uri": "hf://datasets/owner/name", "config": "en", "split": "train", "revision": "v1", "weight": 2}
    assert unsupported(values.spec(dataset={"sources": [hub, {"uri": "s3://b/more.jsonl", "weight": 1}]})) == []
    assert unsupported(values.spec(hyperparameters={"packing": False, "zeroStage": 0, "epochs": 1})) == []
    assert unsupported(values.spec(objective={"type": "KTO"}, hyperparameters={"globalBatchSize": 2})) == []
    assert unsupported(values.spec(hyperparameters={"globalBatchSize": 1})) == []


LIMITS = {"maxSourceTokens": 64, "maxTargetTokens": 64}
ASKS = {"probes": ["Hello"], "generation": {"numBeams": 2}, "metrics": ["bleu"], "maxGenerated": 8}
WEIGHT = {"routerLossWeight": 0.01}


@pytest.mark.parametrize(
    ("kind", "task", "fields"),
    [
        (kind, None, ["maxSourceTokens", "maxTargetTokens"])
        for kind in ("Pretrain", "Reward", "DPO", "ORPO", "KTO", "PPO", "GRPO")
    ]
    + [
        ("Supervised", "MaskedLM", ["maxSourceTokens", "maxTargetTokens"]),
        ("Supervised", "SequenceClassification", ["maxSourceTokens", "maxTargetTokens"]),
        ("Distillation", "SequenceClassification", ["maxSourceTokens", "maxTargetTokens"]),
        ("Evaluation", "TokenClassification", ["maxSourceTokens", "maxTargetTokens"]),
        ("Supervised", "CausalLM", []),
        ("Supervised", "Seq2Seq", []),
        ("Distillation", "CausalLM", []),
        ("Evaluation", "CausalLM", []),
        ("Evaluation", "Seq2Seq", []),
    ],
)
def test_limits_of_prompt_and_completion_are_refused_where_no_record_is_cut_by_them(
    kind: str, task: str | None, fields: list[str]
) -> None:
    job = values.spec(**values.merge(values.OBJECTIVES[kind], {"model": {"task": task}, "dataset": LIMITS}))
    assert [item.field for item in unsupported(job)] == [f"spec.dataset.{name}" for name in fields]


@pytest.mark.parametrize("task", ["MaskedLM", "SequenceClassification", "TokenClassification"])
def test_wishes_about_answers_are_refused_where_the_model_writes_none(task: str) -> None:
    job = values.spec(model={"task": task}, evaluation={**ASKS, "metrics": None})
    names = [item.field.removeprefix("spec.evaluation.") for item in unsupported(job)]
    assert names == ["generation", "maxGenerated", "probes"]
    for writer in ("CausalLM", "Seq2Seq"):
        assert unsupported(values.spec(model={"task": writer}, evaluation=ASKS)) == []


def test_what_only_the_records_show_to_be_in_vain_is_refused_by_the_planner() -> None:
    """The format is detected: before preflight nobody knows that the text is plain."""
    causal = values.spec(dataset=LIMITS)
    require = [{"metric": "loss", "max": 3}, {"metric": "rougeL", "min": 0.1}]
    spans = values.spec(model={"task": "Seq2Seq"}, evaluation={**ASKS, "require": require})
    answers = ["evaluation.generation", "evaluation.maxGenerated", "evaluation.probes", "evaluation.metrics[0]"]
    answers += ["evaluation.require[1].metric"]
    for job, fields in (
        (causal, ["dataset.maxSourceTokens", "dataset.maxTargetTokens"]),
        (values.spec(dataset={"lossOn": "Completion"}), ["dataset.lossOn"]),
        (spans, answers),
    ):
        assert unsupported(job) == []
        assert [item.field for item in unsupported(job, "Text")] == [f"spec.{name}" for name in fields]
        with pytest.raises(FinetuneError) as caught:
            values.plan(job, data=values.data_facts(format="Text"))
        assert (caught.value.failure_class, caught.value.field) == ("UnsupportedField", f"spec.{fields[0]}")
        values.plan(job, model=values.small_model())


def test_shares_of_hidden_text_are_refused_where_the_records_are_no_plain_text() -> None:
    job = values.spec(model={"task": "Seq2Seq"}, objective={"type": "Supervised", "pretrain": {"maskProbability": 0.3}})
    assert unsupported(job) == [] == unsupported(job, "Text")
    [refused] = unsupported(job, "QuestionAnswer")
    assert refused.field == "spec.objective.pretrain"
    assert "the records are read as QuestionAnswer" in refused.message


@pytest.mark.parametrize(
    ("kind", "task", "refused"),
    [
        ("Supervised", "CausalLM", False),
        ("Supervised", "Seq2Seq", False),
        ("Pretrain", None, False),
        ("GRPO", None, False),
        ("Supervised", "MaskedLM", True),
        ("Supervised", "SequenceClassification", True),
        ("Distillation", "SequenceClassification", True),
        ("Reward", None, True),
    ],
)
def test_a_weight_of_the_router_is_refused_where_the_model_tells_no_balance(
    kind: str, task: str | None, refused: bool
) -> None:
    job = values.spec(**values.merge(values.OBJECTIVES[kind], {"model": {"task": task}, "hyperparameters": WEIGHT}))
    assert [item.field for item in unsupported(job)] == ["spec.hyperparameters.routerLossWeight"] * refused


@pytest.mark.parametrize("kind", sorted(values.OBJECTIVES))
def test_noise_is_refused_where_it_would_be_the_difference_of_two_passes(kind: str) -> None:
    job = values.spec(**values.merge(values.OBJECTIVES[kind], {"hyperparameters": {"neftuneAlpha": 5.0}}))
    refused = kind in ("DPO", "KTO", "PPO", "GRPO", "Evaluation")
    assert [item.field for item in unsupported(job)] == ["spec.hyperparameters.neftuneAlpha"] * refused


def test_settings_of_sampling_need_sampling() -> None:
    wishes = {"temperature": 0.7, "topK": 50, "topP": 0.9, "numBeams": 5}
    found = unsupported(values.spec(evaluation={"generation": wishes}))
    assert [item.field.rpartition(".")[2] for item in found] == ["temperature", "topK", "topP"]
    assert unsupported(values.spec(evaluation={"generation": {**wishes, "doSample": True}})) == []


def test_a_number_of_answers_needs_something_that_compares_them() -> None:
    needs = {"require": [{"metric": "rougeL", "min": 0.1}]}
    assert unsupported(values.spec(evaluation={"maxGenerated": 8, **needs})) == []
    assert unsupported(values.spec(**values.OBJECTIVES["Evaluation"], evaluation={"maxGenerated": 8})) == []
    [refused] = unsupported(values.spec(**values.OBJECTIVES["DPO"], evaluation={"maxGenerated": 8}))
    assert refused.message.endswith("none is asked for; remove it")


@pytest.mark.parametrize("kind", TuningType)
def test_tokens_are_added_where_their_embeddings_train(kind: TuningType) -> None:
    found = unsupported(values.spec(tuning={"type": kind}, model={"tokenizer": {"addSpecialTokens": ["<a>"]}}))
    assert bool(found) == (kind not in ("Full", "LoRA", "QLoRA"))


@pytest.mark.parametrize(
    ("pattern", "broken"),
    [
        ("(yes|no", True),
        ("yes)", True),
        ("[a-z", True),
        ("*.json", True),
        ("a**", True),
        ("[z-a]", True),
        ("end\\", True),
        ("^(?:yes|no)[.!]*$", False),
        # What `re` does not take and the trainer does.
        (r"\p{L}+", False),
        ("^?a", False),
        (r"[\d-z]", False),
        ("(?<word>a)", False),
        ("(?<=a+)b", False),
        ("a(?i)b", False),
        ("[[:alpha:]([)]", False),
    ],
)
def test_a_reward_is_refused_for_a_pattern_that_the_trainer_could_not_read(pattern: str, broken: bool) -> None:
    term = {"function": "RegularExpression", "pattern": pattern}
    found = unsupported(values.spec(objective={"type": "GRPO", "grpo": {"rewards": [term]}}))
    assert [item.field for item in found] == (["spec.objective.grpo.rewards[0].pattern"] if broken else [])
    try:
        regex.compile(pattern)
    except regex.error:
        assert broken
    else:
        assert not broken


@pytest.mark.parametrize(("task", "least"), [("CausalLM", 259), ("MaskedLM", 261), ("Seq2Seq", 359)])
def test_byte_pairs_have_room_for_every_byte_and_the_special_tokens(task: str, least: int) -> None:
    for size, fields in ((least - 1, ["spec.objective.pretrain.vocabularySize"]), (least, [])):
        given = {"type": "Pretrain", "pretrain": {"tokenizer": "BytePair", "vocabularySize": size}}
        job = values.spec(objective=given, tuning={"type": "Full"}, model={"task": task})
        assert [item.field for item in unsupported(job)] == fields


@pytest.mark.parametrize("kind", values.OBJECTIVES)
def test_every_objective_is_accepted_and_planned(kind: str) -> None:
    job = values.spec(**values.OBJECTIVES[kind])
    assert unsupported(job) == []
    run = values.plan(job, model=values.small_model(), data=values.data_facts(format="Text")).run
    assert run.objective.type == kind


def test_every_path_of_the_tables_exists() -> None:
    fields = structural(FineTuneJobSpec)
    for path in (*CHOICES, *NOT_YET, *TRAINING_ONLY):
        node = fields
        for part in path.split("."):
            assert part in node["properties"], path
            node = node["properties"][part]
