"""The validity table as CEL: each rule that the spec alone can break becomes a rule of the schema.

Written in the small part of CEL that finetune_trainer.cli.cel understands: no conditional, no macros. A member is
never read before has() of everything above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

from finetune_api import validity
from finetune_api.enums import ObjectiveType, QuantizationType, Task, TuningType

Rule = dict[str, str]

_REWARD = "(has(self.objective) && self.objective.type == 'Reward')"
_QUANTIZED = "(has(self.tuning) && (self.tuning.type == 'QLoRA' || has(self.tuning.quantization)))"
_SETTINGS = "has(self.tuning) && has(self.tuning.quantization)"
_EIGHT_BIT = (
    f"({_SETTINGS} && ((has(self.tuning.quantization.type) && self.tuning.quantization.type == 'Int8') || "
    "(!has(self.tuning.quantization.type) && has(self.tuning.quantization.bits) && "
    "self.tuning.quantization.bits == 8)))"
)
_FOUR_BIT = (QuantizationType.NF4, QuantizationType.FP4)


def validity_rules() -> Iterator[Rule]:
    """One CEL rule on the spec for each rule of the table that names neither the pool nor absent quantisation."""
    for rule in validity.RULES:
        if rule.on_cpu is not None or None in rule.quantization:
            continue
        parts = [
            *([_objective(rule.objective)] if rule.objective else []),
            *([_tuning(rule.tuning)] if rule.tuning else []),
            *([_task(rule.task, rule.objective)] if rule.task else []),
            *([_quantization(rule.quantization)] if rule.quantization else []),
            *([_hyperparameter("zeroStage", [str(stage) for stage in rule.zero_stage])] if rule.zero_stage else []),
            *([_hyperparameter("precision", _words(rule.precision))] if rule.precision else []),
        ]
        yield {"rule": f"!({' && '.join(parts)})", "message": rule.message, "fieldPath": f".{rule.field}"}


def _words(values: Sequence[StrEnum]) -> list[str]:
    return [f"'{value.value}'" for value in values]


def _listed(values: Sequence[StrEnum]) -> str:
    return f"[{', '.join(_words(values))}]"


def _objective(values: Sequence[ObjectiveType]) -> str:
    if ObjectiveType.SUPERVISED in values:
        return f"(!has(self.objective) || self.objective.type in {_listed(values)})"
    return f"(has(self.objective) && self.objective.type in {_listed(values)})"


def _tuning(values: Sequence[TuningType | None]) -> str:
    named = [value for value in values if value is not None]
    if not named:
        return "!has(self.tuning)"
    if None in values:
        return f"(!has(self.tuning) || self.tuning.type in {_listed(named)})"
    return f"(has(self.tuning) && self.tuning.type in {_listed(named)})"


def _task(values: Sequence[Task], objectives: Sequence[ObjectiveType]) -> str:
    """An absent task is SequenceClassification for a Reward model and CausalLM for the rest."""
    parts = [f"(has(self.model.task) && self.model.task in {_listed(values)})"]
    if Task.CAUSAL_LM in values and tuple(objectives) != (ObjectiveType.REWARD,):
        parts.append(
            "!has(self.model.task)" if _without_reward(objectives) else f"(!has(self.model.task) && !{_REWARD})"
        )
    if Task.SEQUENCE_CLASSIFICATION in values and not _without_reward(objectives):
        parts.append(f"(!has(self.model.task) && {_REWARD})")
    return f"({' || '.join(parts)})" if len(parts) > 1 else parts[0]


def _without_reward(objectives: Sequence[ObjectiveType]) -> bool:
    return bool(objectives) and ObjectiveType.REWARD not in objectives


def _quantization(values: Sequence[QuantizationType | None]) -> str:
    if QuantizationType.INT8 in values and set(_FOUR_BIT) <= set(values):
        return _QUANTIZED
    if tuple(values) == (QuantizationType.INT8,):
        return _EIGHT_BIT
    if set(values) == set(_FOUR_BIT):
        return f"({_QUANTIZED} && !{_EIGHT_BIT})"
    raise ValueError(f"no CEL is written for {values}: name all types, the 4-bit ones, or Int8")


def _hyperparameter(name: str, values: Sequence[str]) -> str:
    path = f"self.hyperparameters.{name}"
    return f"(has(self.hyperparameters) && has({path}) && {path} in [{', '.join(values)}])"
