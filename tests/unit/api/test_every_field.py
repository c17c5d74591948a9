"""No field of the spec and no word of the API is ignored: each reaches the run or is refused by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api import job
from finetune_api.crd import structural
from finetune_api.failures import FinetuneError
from finetune_api.job import FROZEN_FIELDS, FineTuneJobSpec
from finetune_api.planner import build_references, preflight_file, unsupported
from tests.unit.api import values

# Fields that change how a run is carried out, not what it computes. The operator reads them from the spec.
OPERATOR_FIELDS = {
    "suspend",
    "cancel",
    "deadlineSeconds",
    "ttlSecondsAfterFinished",
    "retry.maxFailures",
    "priorityClassName",
}
S3 = {"uri": "s3://b/place"}


def _leaves(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every field of the spec that holds a value of its own; lists of objects are entered at their first item."""
    for name, child in schema["properties"].items():
        below = (*path, name)
        if "properties" in child:
            yield from _leaves(child, below)
        elif child.get("type") == "array" and "properties" in child["items"]:
            yield from _leaves(child["items"], (*below, "0"))
        else:
            yield below, child


def _samples(path: tuple[str, ...], schema: dict[str, Any]) -> list[Any]:
    """Legal values of a field, one of which at least differs from what the planner would choose."""
    name = ".".join(path)
    if name in _VALUES:
        return _VALUES[name]
    if "enum" in schema:
        return list(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return [True, False]
    if kind == "array":
        return [["q_proj"]]
    if kind in ("integer", "number"):
        low = schema.get("minimum", 0)
        high = schema.get("maximum", 64)
        if kind == "integer":
            return [min(int(low) + 3, int(high)), 64 if high >= 64 >= low else int(high)]
        return [low + (min(high, 1) - low) / 8, low + (min(high, 1) - low) / 2]
    if path[-1] == "uri":
        return ["s3://elsewhere/place"]
    if path[-1] == "endpoint":
        return ["https://s3.example.com"]
    return ["another"]


_VALUES: dict[str, list[Any]] = {
    "tuning.quantization.bits": [4, 8],
    "evaluation.metrics": [["bleu"]],
    "evaluation.require.0.metric": ["loss", "bleu"],
    "output.publish.uri": ["hf://owner/other"],
    "objective.pretrain.vocabularySize": [512],
    "hyperparameters.maxSequenceLength": [64],
    "hyperparameters.epochs": [0.5, 7.0],
}
_HUB = {"uri": "hf://owner/other", "revision": None}
_TERM = {"function": None, "model": {"uri": "hf://owner/judge"}}


def _rewards(kind: str, **term: Any) -> dict[str, Any]:
    given = values.merge({"function": "ExactMatch"}, term)
    return {"objective": {"type": kind.upper(), kind: {"rewards": [given]}}}


# What has to stand beside a field so that it means something: the longest beginning of its path counts.
_BESIDE: dict[str, dict[str, Any]] = {
    "model.storage": {"model": {"uri": "s3://b/model", "revision": None}},
    "model.fromJob": {"model": {"revision": None}},
    "model.adapter": {"model": {"adapter": {"uri": "s3://b/adapter"}}},
    "model.adapter.revision": {"model": {"adapter": {"uri": "hf://owner/adapter"}}},
    "dataset.validation.source": {"dataset": {"validation": {"source": S3}}},
    "dataset.test.source": {"dataset": {"test": {"source": S3}}},
    "dataset.balanceLabels": {"model": {"task": "SequenceClassification"}},
    "objective.type": {"tuning": {"type": "Full"}},
    "objective.pretrain": values.OBJECTIVES["Pretrain"],
    "objective.pretrain.vocabularySize": {
        "objective": {"type": "Pretrain", "pretrain": {"tokenizer": "BytePair"}},
        "tuning": {"type": "Full"},
    },
    "objective.pretrain.maskProbability": {**values.OBJECTIVES["Pretrain"], "model": {"task": "MaskedLM"}},
    "objective.pretrain.meanSpanLength": {**values.OBJECTIVES["Pretrain"], "model": {"task": "Seq2Seq"}},
    "objective.distillation": values.OBJECTIVES["Distillation"],
    "objective.distillation.teacher.storage": {
        "objective": {"type": "Distillation", "distillation": {"teacher": {"uri": "s3://b/teacher"}}}
    },
    "objective.distillation.teacher.fromJob": {
        "objective": {"type": "Distillation", "distillation": {"teacher": {"uri": None}}}
    },
    "objective.dpo": {"objective": {"type": "DPO"}},
    "objective.orpo": {"objective": {"type": "ORPO"}},
    "objective.kto": {"objective": {"type": "KTO"}},
    **{
        f"objective.{kind}{path}": _rewards(kind, **term)
        for kind in ("ppo", "grpo")
        for path, term in {
            "": {},
            ".rewards.0.model": _TERM,
            ".rewards.0.model.storage": {"function": None, "model": {"uri": "s3://b/judge"}},
            ".rewards.0.model.fromJob": {"function": None, "model": {}},
            ".rewards.0.pattern": {"function": "RegularExpression"},
            ".rewards.0.targetLength": {"function": "Length"},
        }.items()
    },
    "tuning.ia3": {"tuning": {"type": "IA3"}},
    "tuning.ia3.feedforwardModules": {"tuning": {"type": "IA3", "ia3": {"targetModules": ["q_proj"]}}},
    "tuning.softPrompt": {"tuning": {"type": "PromptTuning"}},
    "tuning.softPrompt.projection": {"tuning": {"type": "PrefixTuning"}},
    "tuning.full": {"tuning": {"type": "Full"}},
    "hyperparameters.masterWeights": {"tuning": {"type": "Full"}},
    "hyperparameters.earlyStopping": {"hyperparameters": {"earlyStopping": {"patience": 1}}},
    "evaluation.require": {"evaluation": {"require": [{"metric": "loss"}]}},
    "evaluation.require.0.metric": {"evaluation": {"require": [{"max": 3}]}},
    "evaluation.require.0.min": {"evaluation": {"require": [{"metric": "loss", "max": 3}]}},
    "evaluation.require.0.max": {"evaluation": {"require": [{"metric": "loss", "min": 0}]}},
    "evaluation.retention": {"evaluation": {"retention": S3}},
    "evaluation.benchmarks": {"evaluation": {"benchmarks": [{"name": "ArcEasy", "source": S3}]}},
    "output.publish": {"output": {"publish": {"uri": "hf://owner/name"}}},
    "credentials.serviceAccountName": {"credentials": {"secretName": None}},
}


def _beside(path: tuple[str, ...]) -> dict[str, Any]:
    parts = list(path)
    while parts:
        if (found := _BESIDE.get(".".join(parts))) is not None:
            return found
        parts.pop()
    return {}


def _assign(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A spec in which path holds value, with what must stand beside it; without the field where value is None."""
    document = values.spec_json(**_beside(path))
    node: Any = document
    for part in path[:-1]:
        if part == "0":
            node = node[0]
        else:
            follows = path[path.index(part) + 1]
            node = node.setdefault(part, [{}] if follows == "0" else {})
    if path[-1] in ("config", "split") or (path[-1] == "revision" and "source" in ".".join(path)):
        node["uri"] = "hf://datasets/owner/name"
    if path[-2:] == ("retention", "revision"):
        node["uri"] = "hf://datasets/owner/name"
    if path[-1] == "serviceAccountName":
        node.pop("secretName", None)
    if path[-1] == "fromJob":
        node.pop("uri", None)
    if value is not None:
        node[path[-1]] = value
    return document


def _effect(spec: FineTuneJobSpec) -> Any:
    """Everything that the spec makes happen: the refusals, or references, preflight file and run file.

    Settings carry their reasons ("set by the job"), so they are left out: a field must change the run itself.
    """
    refused = unsupported(spec)
    if refused:
        return [item.field for item in refused]
    references = build_references(spec)
    pools = (values.pool("another", 80, 5.0), *values.GPU_POOLS, values.pool("cheap", 24, 0.1, spot=True))
    try:
        run = values.plan(spec, *pools, model=values.model_facts(**values.mixture(spec))).run.to_json()
    except FinetuneError as error:
        return [error.field]
    run.pop("settings")
    preflight = preflight_file(spec, values.JOB, references).to_json()
    preflight.pop("specDigest")
    return [
        run,
        preflight,
        references.profiles,
        references.config_maps,
        references.claims,
        references.service_account,
    ]


SPEC_LEAVES = [
    (path, schema)
    for path, schema in _leaves(structural(FineTuneJobSpec))
    if ".".join(path) not in OPERATOR_FIELDS and path[-1] != "fromJob"
]


@pytest.mark.parametrize(("path", "schema"), SPEC_LEAVES, ids=[".".join(path) for path, _ in SPEC_LEAVES])
def test_no_field_of_the_spec_is_ignored(path: tuple[str, ...], schema: dict[str, Any]) -> None:
    effects = [_effect(FineTuneJobSpec.from_json(_assign(path, sample))) for sample in _samples(path, schema)]
    others = list(effects[1:])
    with contextlib.suppress(ValidationError):  # where a member has to be there, its values are compared alone
        others.append(_effect(values.spec(**_beside(path))))
    assert any(effect != effects[0] for effect in others), f"{'.'.join(path)} changes nothing and is not refused"


def test_every_field_of_the_spec_is_frozen_or_always_editable() -> None:
    fields = {field.alias for field in FineTuneJobSpec.model_fields.values()}
    editable = {"suspend", "cancel", "retry", "deadlineSeconds", "ttlSecondsAfterFinished"}
    assert fields == set(FROZEN_FIELDS) | editable


ENUMS = {
    "model.task": job.Task,
    "model.attention": job.Attention,
    "dataset.format": job.DataFormat,
    "objective.pretrain.tokenizer": job.PretrainTokenizer,
    "objective.grpo.rewards.0.function": job.BuiltInReward,
    "tuning.softPrompt.init": job.SoftPromptInit,
    "tuning.full.preset": job.Preset,
    "hyperparameters.masterWeights": job.MasterWeights,
    "evaluation.benchmarks.0.name": job.Benchmark,
    "dataset.lossOn": job.LossOn,
    "dataset.truncation": job.Truncation,
    "objective.type": job.ObjectiveType,
    "tuning.type": job.TuningType,
    "tuning.lora.bias": job.LoraBias,
    "tuning.lora.variant": job.LoraVariant,
    "tuning.quantization.type": job.QuantizationType,
    "tuning.quantization.computeType": job.ComputeType,
    "hyperparameters.schedule": job.Schedule,
    "hyperparameters.precision": job.Precision,
    "hyperparameters.optimizer": job.Optimizer,
    "output.onExisting": job.OnExisting,
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, enum in ENUMS.items() for value in enum], ids=lambda v: str(v)
)
def test_every_word_of_the_api_is_honoured_or_refused_by_its_field(field: str, value: StrEnum) -> None:
    spec = FineTuneJobSpec.from_json(_assign(tuple(field.split(".")), value.value))
    refused = unsupported(spec)
    if refused:
        assert [item.field for item in refused] == ["spec.tuning" if field == "objective.type" else f"spec.{field}"]
    else:
        data = values.data_facts(format=spec.dataset.format or "QuestionAnswer")
        model = values.model_facts(1_000_000_000, **values.mixture(spec))
        assert value.value in _words(values.plan(spec, data=data, model=model).run.to_json())


def _words(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set().union(*(_words(child) for key, child in document.items() if key != "settings"))
    if isinstance(document, list):
        return set().union(set(), *(_words(child) for child in document))
    return {document} if isinstance(document, str) else set()
