"""What the schema can say and this release cannot do yet. Such a value is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.job import (
    DataFormat,
    FineTuneJobSpec,
    LoraVariant,
    ObjectiveType,
    QuantizationType,
    Source,
    Task,
    TuningType,
)

TASKS = (Task.CAUSAL_LM,)
OBJECTIVES = (ObjectiveType.SUPERVISED,)
TUNINGS = (TuningType.FULL, TuningType.LORA, TuningType.QLORA)
FORMATS = (
    DataFormat.TEXT,
    DataFormat.PROMPT_COMPLETION,
    DataFormat.MESSAGES,
    DataFormat.ALPACA,
    DataFormat.QUESTION_ANSWER,
)


@dataclass(frozen=True)
class Unsupported:
    """A spec path whose value cannot be honoured, and what to write instead."""

    field: str
    message: str


def unsupported(spec: FineTuneJobSpec) -> list[Unsupported]:
    """Every value of spec that this release cannot honour, in the order of the spec."""
    return [
        Unsupported(f"spec.{path}", message)
        for part in (_model(spec), _dataset(spec), _method(spec), _rest(spec))
        for path, message in part
    ]


def _not_yet(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if value is not None and value is not False:
        yield path, f"{path} is not supported yet; remove it"


def _one_of(value: Any, allowed: tuple[Any, ...], path: str) -> Iterator[tuple[str, str]]:
    if value is not None and value not in allowed:
        yield path, f"{path}: {value} is not supported yet; choose {' or '.join(allowed)}"


def _model(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    model = spec.model
    yield from _not_yet(model.from_job, "model.fromJob")
    if model.revision is not None and not (model.uri or "").startswith("hf://"):
        yield "model.revision", "model.revision belongs to hf://owner/name; remove it"
    yield from _one_of(model.task, TASKS, "model.task")
    yield from _not_yet(model.tokenizer, "model.tokenizer")
    yield from _not_yet(model.adapter, "model.adapter")
    yield from _not_yet(model.cache, "model.cache")


def _dataset(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    dataset = spec.dataset
    for index, source in enumerate(dataset.sources):
        yield from _source(source, f"dataset.sources[{index}]")
    yield from _one_of(dataset.format, FORMATS, "dataset.format")
    if dataset.validation is not None and dataset.validation.source is not None:
        yield from _source(dataset.validation.source, "dataset.validation.source")
        if dataset.validation.source.weight is not None:
            path = "dataset.validation.source.weight"
            yield path, f"{path} has no meaning, because held-out records are not mixed; remove it"
    yield from _not_yet(dataset.test, "dataset.test")
    yield from _not_yet(dataset.max_source_tokens, "dataset.maxSourceTokens")
    yield from _not_yet(dataset.max_target_tokens, "dataset.maxTargetTokens")


def _source(source: Source, path: str) -> Iterator[tuple[str, str]]:
    if source.uri.startswith("hf://datasets/"):
        return
    for name, value in (("config", source.config), ("split", source.split), ("revision", source.revision)):
        if value is not None:
            yield f"{path}.{name}", f"{path}.{name} belongs to hf://datasets/owner/name; remove it"


def _method(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    if spec.objective is not None:
        yield from _one_of(spec.objective.type, OBJECTIVES, "objective.type")
    tuning = spec.tuning
    yield from _one_of(tuning.type, TUNINGS, "tuning.type")
    if tuning.lora is not None:
        yield from _one_of(tuning.lora.variant, (LoraVariant.STANDARD,), "tuning.lora.variant")
    if tuning.quantization is not None:
        if tuning.quantization.bits == 8:
            yield "tuning.quantization.bits", "tuning.quantization.bits: 8 is not supported yet; choose 4"
        yield from _one_of(tuning.quantization.type, (QuantizationType.NF4,), "tuning.quantization.type")
    yield from _not_yet(tuning.full, "tuning.full")
    hyperparameters = spec.hyperparameters
    if hyperparameters is not None:
        yield from _not_yet(hyperparameters.packing, "hyperparameters.packing")
        yield from _not_yet(hyperparameters.early_stopping, "hyperparameters.earlyStopping")
        zero = hyperparameters.zero_stage or 0
        if zero and spec.resources is not None and (spec.resources.nodes or 1) > 1:
            yield (
                "hyperparameters.zeroStage",
                "hyperparameters.zeroStage above 0 is not supported yet on more than one node; set resources.nodes: 1",
            )
        if zero == 3 and tuning.type == TuningType.QLORA:
            yield (
                "hyperparameters.zeroStage",
                "hyperparameters.zeroStage: 3 cannot shard 4-bit weights; choose 0 or 2, or tuning.type: LoRA",
            )


def _rest(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    if spec.evaluation is not None:
        yield from _not_yet(spec.evaluation.metrics, "evaluation.metrics")
        yield from _not_yet(spec.evaluation.require, "evaluation.require")
    if spec.checkpoint is not None:
        yield from _not_yet(spec.checkpoint.keep_best, "checkpoint.keepBest")
    if spec.output.merge_adapter and spec.tuning.type == TuningType.FULL:
        yield "output.mergeAdapter", "output.mergeAdapter belongs to LoRA and QLoRA; remove it"
    yield from _not_yet(spec.queue_name, "queueName")
