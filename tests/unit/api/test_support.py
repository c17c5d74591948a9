"""What this release cannot do is refused by name; everything else reaches the run. No field is ignored."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest

from finetune_api import job
from finetune_api.crd import structural
from finetune_api.failures import FinetuneError
from finetune_api.job import FROZEN_FIELDS, FineTuneJobSpec
from finetune_api.planner import build_references, preflight_file, unsupported
from finetune_api.planner.support import CHOICES, NOT_YET
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
# Settings of methods that are refused as a whole: CEL lets them stand beside their own type only.
OF_REFUSED_TYPES = ("objective.", "tuning.softPrompt.")

REFUSED: dict[str, dict[str, Any]] = {
    "spec.model.fromJob": {"model": {"fromJob": "earlier", "uri": None, "revision": None}},
    "spec.model.revision": {"model": {"uri": "s3://b/model", "revision": "v1"}},
    "spec.model.task": {"model": {"task": "Seq2Seq"}},
    "spec.model.attention": {"model": {"attention": "Flash"}},
    "spec.model.tokenizer": {"model": {"tokenizer": {"addSpecialTokens": ["<a>"]}}},
    "spec.model.adapter": {"model": {"adapter": {"uri": "s3://b/adapter"}}},
    "spec.model.cache": {"model": {"cache": {"claimName": "models"}}},
    "spec.dataset.sources[1].config": {
        "dataset": {"sources": [{"uri": "s3://b/one.jsonl"}, {"uri": "s3://b/two.jsonl", "config": "en"}]}
    },
    "spec.dataset.sources[0].split": {"dataset": {"sources": [{"uri": "s3://b/one.jsonl", "split": "test"}]}},
    "spec.dataset.sources[0].revision": {"dataset": {"sources": [{"uri": "s3://b/one.jsonl", "revision": "v1"}]}},
    "spec.dataset.validation.source.split": {
        "dataset": {"validation": {"source": {"uri": "s3://b/validation.jsonl", "split": "test"}}}
    },
    "spec.dataset.validation.source.weight": {
        "dataset": {"validation": {"source": {"uri": "s3://b/validation.jsonl", "weight": 2}}}
    },
    "spec.dataset.format": {"dataset": {"format": "Preference"}},
    "spec.dataset.test": {"dataset": {"test": {"fraction": 0.1}}},
    "spec.dataset.maxSourceTokens": {"dataset": {"maxSourceTokens": 64}},
    "spec.dataset.maxTargetTokens": {"dataset": {"maxTargetTokens": 64}},
    "spec.objective.type": {"objective": {"type": "DPO"}},
    "spec.tuning.type": {"tuning": {"type": "IA3"}},
    "spec.tuning.lora.variant": {"tuning": {"lora": {"variant": "DoRA"}}},
    "spec.tuning.quantization.bits": {"tuning": {"quantization": {"bits": 8}}},
    "spec.tuning.quantization.type": {"tuning": {"quantization": {"type": "FP4"}}},
    "spec.tuning.full": {"tuning": {"type": "Full", "full": {"freeze": ["*.bias"]}}},
    "spec.hyperparameters.packing": {"hyperparameters": {"packing": True}},
    "spec.hyperparameters.earlyStopping": {"hyperparameters": {"earlyStopping": {"patience": 2}}},
    "spec.evaluation.metrics": {"evaluation": {"metrics": ["bleu"]}},
    "spec.evaluation.require": {"evaluation": {"require": [{"metric": "loss", "max": 2}]}},
    "spec.checkpoint.keepBest": {"checkpoint": {"keepBest": 1}},
    "spec.output.mergeAdapter": {"tuning": {"type": "Full"}, "output": {"mergeAdapter": True}},
    "spec.queueName": {"queueName": "team-a"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_that_cannot_be_honoured_is_refused_by_its_path(field: str) -> None:
    found = unsupported(values.spec(**REFUSED[field]))
    assert [item.field for item in found] == [field]
    assert found[0].message.startswith(field.removeprefix("spec."))
    # The message says what to do instead.
    assert any(word in found[0].message for word in ("remove", "choose", "set ")), found[0].message


def test_the_planner_names_every_refused_field_at_once() -> None:
    bad = values.spec(queueName="q", hyperparameters={"packing": True}, checkpoint={"keepBest": 1})
    with pytest.raises(FinetuneError) as caught:
        values.plan(bad)
    assert caught.value.failure_class == "UnsupportedField"
    assert caught.value.field == "spec.hyperparameters.packing"
    for name in ("hyperparameters.packing", "checkpoint.keepBest", "queueName"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hyperparameters": {"zeroStage": 2}, "resources": {"nodes": 2}}, "spec.hyperparameters.zeroStage"),
        ({"hyperparameters": {"zeroStage": 3}}, "spec.hyperparameters.zeroStage"),
        ({"hyperparameters": {"zeroStage": 1, "optimizer": "Lion"}}, "spec.hyperparameters.optimizer"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes: dict[str, Any], field: str) -> None:
    assert [item.field for item in unsupported(values.spec(**changes))] == [field]


def test_the_smallest_job_and_one_with_plain_settings_are_accepted() -> None:
    assert unsupported(values.spec()) == []
    hub = {"uri": "hf://datasets/owner/name", "config": "en", "split": "train", "revision": "v1", "weight": 2}
    assert unsupported(values.spec(dataset={"sources": [hub, {"uri": "s3://b/more.jsonl", "weight": 1}]})) == []
    assert unsupported(values.spec(hyperparameters={"packing": False, "zeroStage": 0, "epochs": 1})) == []


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
    if "enum" in schema:
        return list(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return [True, False]
    if kind == "array":
        return [["q_proj"]]
    if kind == "integer" and path[-1] == "bits":
        return [4, 8]
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


def _assign(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A spec in which path holds value, with what must stand beside it."""
    beside: dict[str, Any] = {}
    name = ".".join(path)
    if name.startswith("tuning.full."):
        beside = {"tuning": {"type": "Full"}}
    elif name.startswith("tuning.quantization."):
        beside = {"tuning": {"type": "QLoRA"}}
    elif name == "model.fromJob":
        beside = {"model": {"uri": None, "revision": None}}
    elif name.startswith("model.storage."):
        beside = {"model": {"uri": "s3://b/model", "revision": None}}
    nested: Any = value
    for part in reversed(path):
        if part == "0":
            nested = [{**_required_beside(path), **nested}]
        else:
            nested = {part: nested}
    if name.startswith("dataset.validation.") and "source" in path:
        nested["dataset"]["validation"]["source"].setdefault("uri", "s3://b/validation.jsonl")
    if name.startswith("dataset.test.") and "source" in path:
        nested["dataset"]["test"]["source"].setdefault("uri", "s3://b/test.jsonl")
    if name.startswith("hyperparameters.earlyStopping."):
        nested["hyperparameters"]["earlyStopping"].setdefault("patience", 3)
    if name == "credentials.serviceAccountName":
        nested["credentials"]["secretName"] = None
    return values.spec_json(**values.merge(beside, nested))


def _required_beside(path: tuple[str, ...]) -> dict[str, Any]:
    if path[-1] in ("config", "split", "revision"):
        return {"uri": "hf://datasets/owner/name"}
    if path[0] == "dataset":
        return {"uri": "s3://team-a/faq/train.jsonl"}
    return {"metric": "loss"}


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
        run = values.plan(spec, *pools).run.to_json()
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
    if ".".join(path) not in OPERATOR_FIELDS
    and (".".join(path) == "objective.type" or not ".".join(path).startswith(OF_REFUSED_TYPES))
]


@pytest.mark.parametrize(("path", "schema"), SPEC_LEAVES, ids=[".".join(path) for path, _ in SPEC_LEAVES])
def test_no_field_of_the_spec_is_ignored(path: tuple[str, ...], schema: dict[str, Any]) -> None:
    effects = [_effect(FineTuneJobSpec.from_json(_assign(path, sample))) for sample in _samples(path, schema)]
    assert len(effects) > 1 or effects[0] != _effect(values.spec())
    unset = _effect(values.spec())
    assert any(effect != unset for effect in effects), f"{'.'.join(path)} changes nothing and is not refused"


def test_every_field_of_the_spec_is_frozen_or_always_editable() -> None:
    fields = {field.alias for field in FineTuneJobSpec.model_fields.values()}
    editable = {"suspend", "cancel", "retry", "deadlineSeconds", "ttlSecondsAfterFinished"}
    assert fields == set(FROZEN_FIELDS) | editable


ENUMS = {
    "model.task": job.Task,
    "model.attention": job.Attention,
    "dataset.format": job.DataFormat,
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
        assert [item.field for item in refused] == [f"spec.{field}"]
        assert str(value) in refused[0].message
    else:
        data = values.data_facts(format=spec.dataset.format or "QuestionAnswer")
        assert value.value in _words(values.plan(spec, data=data).run.to_json())


def _words(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set().union(*(_words(child) for key, child in document.items() if key != "settings"))
    if isinstance(document, list):
        return set().union(set(), *(_words(child) for child in document))
    return {document} if isinstance(document, str) else set()


def test_every_path_of_the_tables_exists() -> None:
    fields = structural(FineTuneJobSpec)
    for path in (*CHOICES, *NOT_YET):
        node = fields
        for part in path.split("."):
            assert part in node["properties"], path
            node = node["properties"][part]
