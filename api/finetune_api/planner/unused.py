"""Fields that the job's method, task or data have no use for: refused by name, because a value without effect misleads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.base import Document
from finetune_api.job import FineTuneJobSpec, LossOn, ObjectiveType, Task
from finetune_api.metrics import ANSWERED, TEXT_METRICS, WRITERS
from finetune_api.planner.pretrain import is_noised
from finetune_api.planner.tuning import WITHOUT_DROPOUT

# Fields that say how to train: an evaluation has no use for them.
TRAINING_ONLY = (
    *(
        f"hyperparameters.{name}"
        for name in (
            "epochs",
            "maxSteps",
            "learningRate",
            "schedule",
            "warmupRatio",
            "weightDecay",
            "globalBatchSize",
            "packing",
            "groupByLength",
            "optimizer",
            "masterWeights",
            "neftuneAlpha",
            "routerLossWeight",
            "gradientCheckpointing",
            "maxGradNorm",
            "earlyStopping",
        )
    ),
    "tuning.lora",
    "dataset.validation",
    "dataset.test",
    "dataset.balanceLabels",
    "evaluation.everySteps",
    "checkpoint",
    "guards",
    "output.mergeAdapter",
    "output.maxShardSizeGiB",
    "output.publish",
)

_WRITTEN = ("evaluation.generation", "evaluation.maxGenerated", "evaluation.probes")
_SAMPLED = ("temperature", "topK", "topP")
Found = Iterator[tuple[str, str]]
"""Spec paths without `spec.`, and what is wrong with their values."""


def unused(spec: FineTuneJobSpec, data_format: str) -> Found:
    """Every field that is set in vain. data_format: how the records are read, "" where nobody knows it yet."""
    yield from _records(spec, data_format)
    yield from _training(spec)
    yield from _answers(spec, data_format)
    yield from _further_records(spec)
    yield from _evaluation_only(spec)


def value_at(spec: FineTuneJobSpec, path: str) -> Any:
    """The value of a spec path, None where it or something above it is absent."""
    value: Any = spec
    for part in path.split("."):
        if not isinstance(value, Document):
            return None
        name = next(name for name, field in type(value).model_fields.items() if field.alias == part)
        value = getattr(value, name)
    return value


def _records(spec: FineTuneJobSpec, data_format: str) -> Found:
    answers = spec.objective_type in ANSWERED
    if spec.dataset.loss_on is not None and not (spec.task == Task.CAUSAL_LM and answers):
        yield "dataset.lossOn", "dataset.lossOn belongs to Supervised tuning of causal models; remove it"
    elif spec.dataset.loss_on == LossOn.COMPLETION and data_format == "Text":
        yield "dataset.lossOn", "dataset.lossOn: plain text has no completion; remove it, or set All"
    gaps = spec.objective is not None and spec.objective.pretrain is not None and spec.task == Task.SEQ2SEQ
    if gaps and data_format and not is_noised(spec, data_format):
        why = f"is about plain text, and the records are read as {data_format}"
        yield "objective.pretrain", f"objective.pretrain {why}; remove it, or set dataset.format: Text"
    if spec.dataset.balance_labels and not (
        spec.task == Task.SEQUENCE_CLASSIFICATION and spec.objective_type == ObjectiveType.SUPERVISED
    ):
        yield "dataset.balanceLabels", "dataset.balanceLabels belongs to SequenceClassification; remove it"
    for path in ("dataset.maxSourceTokens", "dataset.maxTargetTokens"):
        if value_at(spec, path) is None:
            continue
        if not (answers and spec.task in WRITERS):
            why = "belongs to Supervised tuning of CausalLM and Seq2Seq models"
        elif data_format == "Text":
            why = "limits a prompt or its completion, and plain text has neither"
        else:
            continue
        yield path, f"{path} {why}; remove it, or set hyperparameters.maxSequenceLength instead"


def _training(spec: FineTuneJobSpec) -> Found:
    path, trains = "hyperparameters.routerLossWeight", spec.objective_type != ObjectiveType.EVALUATION
    if value_at(spec, path) is not None and trains and spec.task not in WRITERS:
        why = f"{spec.task} models do not tell how their router spreads the tokens"
        yield path, f"{path}: {why}; remove it, or choose CausalLM or Seq2Seq as model.task"
    path = "hyperparameters.neftuneAlpha"
    if value_at(spec, path) is not None and spec.objective_type in WITHOUT_DROPOUT:
        why = f"{spec.objective_type} compares two passes, and the noise would be their difference"
        yield path, f"{path}: {why}; remove it"


def _answers(spec: FineTuneJobSpec, data_format: str) -> Found:
    """What is said about answers where none is written, or where they are not written so."""
    given = spec.evaluation
    if given is None:
        return
    spans = spec.task == Task.SEQ2SEQ and is_noised(spec, data_format)
    if spec.task not in WRITERS or spans:
        what = "a model that fills the gaps of plain text" if spans else f"a {spec.task} model"
        paths = [path for path in _WRITTEN if value_at(spec, path) is not None]
        if spans:  # the table of metrics knows the others
            named = [(f"evaluation.metrics[{k}]", name) for k, name in enumerate(given.metrics or [])]
            named += [(f"evaluation.require[{k}].metric", item.metric) for k, item in enumerate(given.require or [])]
            paths += [path for path, name in named if name in TEXT_METRICS]
        yield from ((path, f"{path} is about answers, and {what} writes none; remove it") for path in paths)
        return
    asked = {*(given.metrics or []), *(item.metric for item in given.require or [])}
    evaluates = spec.objective_type == ObjectiveType.EVALUATION
    if given.max_generated is not None and not evaluates and not asked & set(TEXT_METRICS):
        path, why = "evaluation.maxGenerated", "counts the answers that a metric compares, and none is asked for"
        mend = f", or set evaluation.metrics: [{TEXT_METRICS[0]}]" if spec.objective_type in ANSWERED else ""
        yield path, f"{path} {why}; remove it{mend}"
    for name in _SAMPLED if given.generation is not None and not given.generation.do_sample else ():
        path = f"evaluation.generation.{name}"
        if value_at(spec, path) is not None:
            yield path, f"{path} belongs to answers that are sampled; remove it, or set doSample: true beside it"


def _further_records(spec: FineTuneJobSpec) -> Found:
    for path in ("evaluation.retention", "evaluation.benchmarks"):
        if value_at(spec, path) and spec.task != Task.CAUSAL_LM:
            yield path, f"{path} is measured of CausalLM models, not of {spec.task} models; remove it"


def _evaluation_only(spec: FineTuneJobSpec) -> Found:
    if spec.objective_type != ObjectiveType.EVALUATION:
        return
    for path in TRAINING_ONLY:
        value = value_at(spec, path)
        if value is not None and value is not False:
            yield path, f"{path}: an evaluation does not train; remove it"
