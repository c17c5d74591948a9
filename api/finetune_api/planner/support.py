"""What the schema can say and this release cannot do yet. Such a value is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.base import Document
from finetune_api.job import (
    Attention,
    DataFormat,
    FineTuneJobSpec,
    LoraVariant,
    ObjectiveType,
    Optimizer,
    QuantizationType,
    Source,
    Task,
    TuningType,
)

# Fields with some values that work. docs/supported.md is generated from this table and the next.
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.task": (Task.CAUSAL_LM,),
    "model.attention": (Attention.EAGER, Attention.SDPA),
    "dataset.format": (
        DataFormat.TEXT,
        DataFormat.PROMPT_COMPLETION,
        DataFormat.MESSAGES,
        DataFormat.ALPACA,
        DataFormat.QUESTION_ANSWER,
    ),
    "objective.type": (ObjectiveType.SUPERVISED,),
    "tuning.type": (TuningType.FULL, TuningType.LORA, TuningType.QLORA),
    "tuning.lora.variant": (LoraVariant.STANDARD,),
    "tuning.quantization.bits": (4,),
    "tuning.quantization.type": (QuantizationType.NF4,),
}

# Fields that must be absent (a field of type boolean: absent or false).
NOT_YET = (
    "model.tokenizer",
    "model.adapter",
    "model.fromJob",
    "model.cache",
    "dataset.test",
    "dataset.maxSourceTokens",
    "dataset.maxTargetTokens",
    "tuning.full",
    "hyperparameters.packing",
    "hyperparameters.earlyStopping",
    "evaluation.metrics",
    "evaluation.require",
    "checkpoint.keepBest",
    "queueName",
)

# DeepSpeed shards the state of these.
ZERO_OPTIMIZERS = (Optimizer.ADAMW,)

_ORDER = [field.alias for field in FineTuneJobSpec.model_fields.values()]


@dataclass(frozen=True)
class Unsupported:
    """A spec path whose value cannot be honoured, and what to write instead."""

    field: str
    message: str


def unsupported(spec: FineTuneJobSpec) -> list[Unsupported]:
    """Every value of spec that this release cannot honour, in the order of the spec."""
    found = [*_refused_choices(spec), *_not_yet(spec), *_places(spec), *_combinations(spec)]
    found.sort(key=lambda item: _ORDER.index(item[0].split(".")[0]))
    return [Unsupported(f"spec.{path}", message) for path, message in found]


def _value(spec: FineTuneJobSpec, path: str) -> Any:
    """The value of a spec path, None where it or something above it is absent."""
    value: Any = spec
    for part in path.split("."):
        if not isinstance(value, Document):
            return None
        name = next(name for name, field in type(value).model_fields.items() if field.alias == part)
        value = getattr(value, name)
    return value


def _refused_choices(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    for path, allowed in CHOICES.items():
        value = _value(spec, path)
        if value is not None and value not in allowed:
            yield path, f"{path}: {value} is not supported yet; choose {' or '.join(map(str, allowed))}"


def _not_yet(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    for path in NOT_YET:
        value = _value(spec, path)
        if value is not None and value is not False:
            yield path, f"{path} is not supported yet; remove it"


def _places(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    model = spec.model
    if model.revision is not None and not (model.uri or "").startswith("hf://"):
        yield "model.revision", "model.revision belongs to hf://owner/name; remove it"
    for index, source in enumerate(spec.dataset.sources):
        yield from _source(source, f"dataset.sources[{index}]")
    if spec.dataset.validation is not None and spec.dataset.validation.source is not None:
        path = "dataset.validation.source"
        yield from _source(spec.dataset.validation.source, path)
        if spec.dataset.validation.source.weight is not None:
            yield f"{path}.weight", f"{path}.weight has no meaning, because held-out records are not mixed; remove it"


def _source(source: Source, path: str) -> Iterator[tuple[str, str]]:
    if source.uri.startswith("hf://datasets/"):
        return
    for name, value in (("config", source.config), ("split", source.split), ("revision", source.revision)):
        if value is not None:
            yield f"{path}.{name}", f"{path}.{name} belongs to hf://datasets/owner/name; remove it"


def _combinations(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    zero = _value(spec, "hyperparameters.zeroStage") or 0
    path = "hyperparameters.zeroStage"
    if zero and (_value(spec, "resources.nodes") or 1) > 1:
        yield path, f"{path} above 0 is not supported yet on more than one node; set resources.nodes: 1"
    if zero == 3 and spec.tuning_type == TuningType.QLORA:
        yield path, f"{path}: 3 cannot shard 4-bit weights; choose 0 or 2, or tuning.type: LoRA"
    optimizer = _value(spec, "hyperparameters.optimizer")
    if zero and optimizer not in (None, *ZERO_OPTIMIZERS):
        path = "hyperparameters.optimizer"
        yield path, f"{path}: {optimizer} does not work with zeroStage above 0; choose {' or '.join(ZERO_OPTIMIZERS)}"
    if spec.output.merge_adapter and spec.tuning_type == TuningType.FULL:
        yield "output.mergeAdapter", "output.mergeAdapter belongs to LoRA and QLoRA; remove it"
