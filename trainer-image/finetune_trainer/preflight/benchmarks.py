"""Whether records have the columns that a benchmark of lm-evaluation-harness 0.4 reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from finetune_api.job import Benchmark
from finetune_trainer.data.readers import type_word
from finetune_trainer.data.records import BadRecord, Record

MMLU_CHOICES = 4
_MEND = "Take the data set as it is published, or rename the columns."


def check_benchmark(record: Record, name: Benchmark) -> BadRecord | None:
    """What is wrong with a record of a benchmark; None if the harness can read it."""
    problem = _CHECKS[name](record.fields)
    return record.bad(f"for {name.value}, {problem}", _MEND) if problem else None


def _arc(fields: Mapping[str, Any]) -> str:
    if problem := _not_text(fields, "question", "answerKey"):
        return problem
    choices = fields.get("choices")
    if not isinstance(choices, Mapping) or not _texts(choices.get("text")) or not _texts(choices.get("label")):
        return "choices must be {text: [...], label: [...]}"
    if len(choices["text"]) != len(choices["label"]):
        return f"choices has {len(choices['text'])} texts and {len(choices['label'])} labels"
    key = fields["answerKey"]
    return "" if key in choices["label"] else f"answerKey {key[:20]!r} is none of the labels of choices"


def _hella_swag(fields: Mapping[str, Any]) -> str:
    if problem := _not_text(fields, "ctx_a", "ctx_b", "activity_label"):
        return problem
    endings = fields.get("endings")
    if not _texts(endings):
        return "endings must be a list of texts"
    return _not_below(fields.get("label"), len(endings), "label", "endings")


def _mmlu(fields: Mapping[str, Any]) -> str:
    if problem := _not_text(fields, "question"):
        return problem
    choices = fields.get("choices")
    if not _texts(choices) or len(choices) != MMLU_CHOICES:
        return f"choices must be a list of {MMLU_CHOICES} texts"
    return _not_below(fields.get("answer"), MMLU_CHOICES, "answer", "choices")


def _truthful_qa(fields: Mapping[str, Any]) -> str:
    if problem := _not_text(fields, "question"):
        return problem
    for column in ("mc1_targets", "mc2_targets"):
        targets = fields.get(column)
        if not isinstance(targets, Mapping) or not _texts(targets.get("choices")):
            return f"{column} must be {{choices: [...], labels: [...]}}"
        labels = targets.get("labels")
        if not isinstance(labels, list) or len(labels) != len(targets["choices"]):
            return f"{column} needs one label for each choice"
    # The harness takes the first choice as the right one.
    return "" if fields["mc1_targets"]["labels"][0] == 1 else "the first choice of mc1_targets must be the right one"


def _not_text(fields: Mapping[str, Any], *columns: str) -> str:
    for column in columns:
        if column not in fields:
            return f"there is no column {column!r}; there are {', '.join(map(str, list(fields)[:12])) or 'none'}"
        if not isinstance(fields[column], str):
            return f"column {column!r} is {type_word(fields[column])}, not text"
    return ""


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _not_below(value: Any, count: int, column: str, of: str) -> str:
    """HellaSwag writes its numbers as text."""
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    if type(number) is int and 0 <= number < count:
        return ""
    return f"{column} must be the number of one of {of}, 0 to {count - 1}, and is {str(value)[:20]!r}"


_CHECKS: dict[Benchmark, Callable[[Mapping[str, Any]], str]] = {
    Benchmark.ARC_EASY: _arc,
    Benchmark.ARC_CHALLENGE: _arc,
    Benchmark.HELLA_SWAG: _hella_swag,
    Benchmark.MMLU: _mmlu,
    Benchmark.TRUTHFUL_QA: _truthful_qa,
}
