"""The values of a record's columns, and what is wrong with one that is not as it should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_trainer.data.formats import RecordShape, listed
from finetune_trainer.data.readers import type_word
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.template import BraceTemplate, TemplateRefusal

_LONGEST_LABEL = 256
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def text_of(record: Record, role: str, column: str, *, allow_empty: bool = False) -> str | BadRecord:
    """The text in a column; a BadRecord if it is absent, no text, or empty where it may not be."""
    value = record.fields.get(column)
    if column not in record.fields:
        return missing(record, role, column)
    if not isinstance(value, str):
        return record.bad(f"column {column!r} is {type_word(value)}, not text", _give(column))
    if not allow_empty and not value.strip():
        return record.bad(f"column {column!r} is empty", _give(column))
    return value


def label_of(record: Record, column: str) -> str | BadRecord:
    """The name of a class: a text without white space around it, or a whole number as text."""
    value = record.fields.get(column)
    if column not in record.fields:
        return missing(record, "label", column)
    mend = f"Give each record one class in {column!r}: a text or a whole number."
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        what = "a fraction" if isinstance(value, float) else type_word(value)
        return record.bad(f"column {column!r} is {what}, not the name of a class", mend)
    text = str(value).strip()
    if len(text) > _LONGEST_LABEL:
        return record.bad(f"column {column!r} has {len(text)} characters, too many for the name of a class", mend)
    return text if text else record.bad(f"column {column!r} is empty", mend)


def verdict_of(record: Record, column: str) -> bool | BadRecord:
    """Whether a completion is a good one: true or false, also as text or as 1 and 0."""
    value = record.fields.get(column)
    if column not in record.fields:
        return missing(record, "label", column)
    word = str(value).strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    return record.bad(
        f"column {column!r} is {str(value)[:40]!r}, neither true nor false",
        f"Write true in {column!r} for a good completion and false for a bad one.",
    )


def words_of(record: Record, role: str, column: str) -> tuple[str, ...] | BadRecord:
    """A list of texts that are not empty; a text is split at white space (csv has no lists)."""
    value = record.fields.get(column)
    if column not in record.fields:
        return missing(record, role, column)
    if isinstance(value, str):
        value = value.split()
    mend = f"Give each record a list of texts in {column!r}."
    if not isinstance(value, list):
        return record.bad(f"column {column!r} is {type_word(value)}, not a list", mend)
    if not value:
        return record.bad(f"column {column!r} is empty", mend)
    for number, item in enumerate(value, 1):
        if not isinstance(item, str) or not item.strip():
            what = "empty" if isinstance(item, str) else f"{type_word(item)}, not text"
            if role == "tags" and isinstance(item, int):
                mend = f"Write the names of the tags in {column!r}, such as O, B-PER, I-PER, not their numbers."
            return record.bad(f"item {number} of column {column!r} is {what}", mend)
    return tuple(value)


def filled(record: Record, shape: RecordShape, completion: str | None) -> tuple[str, str] | BadRecord:
    """(prompt, completion) by the template; the completion is empty where the template does not end with one.

    completion: the column that ends the template, whose value may not be empty.
    """
    template = shape.template
    assert template is not None  # the caller has seen it
    fields = record.fields
    if completion and shape.prompts and fields.get(completion) is None:
        fields = {**fields, completion: ""}
    needed = None if shape.prompts else completion
    if isinstance(template, BraceTemplate):
        for column in template.columns:
            value = fields.get(column)
            if isinstance(value, int | float) and not isinstance(value, bool):
                continue
            found = text_of(replace(record, fields=fields), "promptTemplate", column, allow_empty=column != needed)
            if isinstance(found, BadRecord):
                return found
    try:
        prompt, rest = template.split(fields) if completion else (template.whole(fields), "")
    except TemplateRefusal as refusal:
        return record.bad(str(refusal), "Correct the record or dataset.promptTemplate.")
    if needed and not rest.strip():
        return record.bad(f"column {needed!r} is empty", _give(needed))
    return prompt, rest


def missing(record: Record, role: str, column: str) -> BadRecord:
    """A record without a column that it must have."""
    problem = f"there is no column {column!r}; there are {listed(record.fields)}"
    if role == "promptTemplate":
        return record.bad(problem, _give(column))
    return record.bad(problem, f"Add the column {column!r} to each record, or name yours in dataset.columns.{role}.")


def absent(record: Record, shape: RecordShape, role: str) -> bool:
    """Whether a record lacks a role that it may lack."""
    return role in shape.optional and record.fields.get(shape.columns[role]) is None


def as_list(record: Record, column: str) -> list[Any] | None:
    """The list in a column; None if there is none."""
    value = record.fields.get(column)
    return value if isinstance(value, list) else None


def _give(column: str) -> str:
    return f"Give each record a text in {column!r}."
