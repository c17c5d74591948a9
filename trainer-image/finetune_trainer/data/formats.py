"""What the columns of a record mean: the formats, how one is recognised, and records turned into examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat
from finetune_trainer.data.readers import type_word
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.template import PromptTemplate, check_columns, check_completion_last, parse_template

# What a role's column is called in each format. The order is that in which formats are tried.
COLUMNS: dict[DataFormat, dict[str, str]] = {
    DataFormat.MESSAGES: {"messages": "messages"},
    DataFormat.ALPACA: {"prompt": "instruction", "input": "input", "completion": "output"},
    DataFormat.QUESTION_ANSWER: {"prompt": "question", "completion": "answer"},
    DataFormat.PROMPT_COMPLETION: {"prompt": "prompt", "completion": "completion"},
    DataFormat.TEXT: {"text": "text"},
}
_OPTIONAL = {"input"}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of an example. role: one of ROLES in a conversation; `prompt`, `completion` or `text` where the text is
    used as it stands."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: a conversation, a filled template (prompt, completion), or plain text.

    Preference: turns is the prompt, chosen and rejected are the two ways to go on (rejected empty with a judged
    completion of KTO, whose label is "true" or "false"). Labels: turns is the text, label its class. Tags: words and
    tags, one of each. `reference` of a prompt for PPO or GRPO is the completion in turns, if there is one.
    """

    record: Record
    turns: tuple[Turn, ...]
    chosen: tuple[Turn, ...] = ()
    rejected: tuple[Turn, ...] = ()
    label: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordShape:
    """How records are read. columns: role → column. reason: why this format, for status and report."""

    format: DataFormat
    columns: Mapping[str, str]
    template: PromptTemplate | None
    reason: str


def resolve_shape(
    format: DataFormat | None, columns: Columns | None, prompt_template: str | None, first: Mapping[str, Any]
) -> RecordShape:
    """The shape of a data set from its settings and the columns of its first record.

    Raises FinetuneError: InvalidSpec for a template that does not fit, DataInvalid when no format fits the columns.
    """
    renamed = {role: name for role, name in columns.model_dump().items() if name} if columns else {}
    template = parse_template(prompt_template) if prompt_template else None
    if template is not None:
        check_columns(template, first)
    if format is not None:
        reason = "set by dataset.format"
    else:
        format, reason = _detect(renamed, template, first)
    if format not in COLUMNS:
        raise FinetuneError(
            f"dataset.format {format.value} is not supported by this release. "
            f"Use one of {', '.join(known.value for known in COLUMNS)}.",
            failure_class="InvalidSpec",
            field="spec.dataset.format",
        )
    named = {role: renamed.get(role, default) for role, default in COLUMNS[format].items()}
    if template is not None:
        named = _with_template(format, named, renamed, template)
    return RecordShape(format, named, template, reason)


def to_example(record: Record, shape: RecordShape) -> Example | BadRecord:
    """The example that a record stands for, or what is wrong with the record."""
    if shape.format is DataFormat.MESSAGES:
        return _conversation(record, shape.columns["messages"])
    if shape.template is not None:
        return _filled(record, shape, shape.template)
    texts: dict[str, str] = {}
    for role, column in shape.columns.items():
        value = record.fields.get(column)
        if value is None and role in _OPTIONAL:
            continue
        problem = _text_problem(record, column, value, allow_empty=role in _OPTIONAL)
        if problem:
            return record.bad(problem, _mend(problem, role, column))
        texts[role] = str(value)
    if shape.format is DataFormat.TEXT:
        return Example(record, (Turn("text", texts["text"]),))
    prompt = texts["prompt"]
    if texts.get("input", "").strip():
        prompt = f"{prompt}\n\n{texts['input']}"
    return Example(record, (Turn("user", prompt), Turn("assistant", texts["completion"])))


def _detect(
    renamed: Mapping[str, str], template: PromptTemplate | None, first: Mapping[str, Any]
) -> tuple[DataFormat, str]:
    for format, roles in COLUMNS.items():
        needed = {role: renamed.get(role, name) for role, name in roles.items() if role not in _OPTIONAL}
        if not all(name in first for name in needed.values()):
            continue
        # Alpaca and QuestionAnswer are known by names of their own: with all of them renamed nothing tells them apart.
        if format in (DataFormat.ALPACA, DataFormat.QUESTION_ANSWER) and needed.keys() <= renamed.keys():
            if format is DataFormat.QUESTION_ANSWER or "input" not in renamed:
                continue
        if template is not None and (format is DataFormat.TEXT or needed.get("completion") != template.completion):
            continue
        found = " and ".join(needed.values())
        word = "columns" if len(needed) > 1 else "column"
        return format, f"read as {format.value} because the first record has the {word} {found}"
    if template is not None:
        return DataFormat.PROMPT_COMPLETION, (
            f"read as PromptCompletion because dataset.promptTemplate ends with {{{template.completion}}}"
        )
    hint = " (ShareGPT records are not supported by this release)" if "conversations" in first else ""
    known = "; ".join(
        f"{format.value}: {', '.join(name for role, name in roles.items() if role not in _OPTIONAL)}"
        for format, roles in COLUMNS.items()
    )
    raise FinetuneError(
        f"The format of the data is not clear{hint}: the first record has the columns {_listed(first)}. "
        f"Known are {known}. Rename the columns, name yours in dataset.columns, or set dataset.promptTemplate.",
        failure_class="DataInvalid",
        field="spec.dataset.columns",
    )


def _with_template(
    format: DataFormat, named: dict[str, str], renamed: Mapping[str, str], template: PromptTemplate
) -> dict[str, str]:
    if format is DataFormat.MESSAGES:
        raise FinetuneError(
            "dataset.promptTemplate cannot be used with Messages: the turns of a conversation are put together by the "
            "model's chat template. Remove promptTemplate.",
            failure_class="InvalidSpec",
            field="spec.dataset.promptTemplate",
        )
    if format is DataFormat.TEXT:
        return {column: column for column in template.columns}
    # Columns of one's own need no dataset.columns when the template already says which one comes last.
    known = format is not DataFormat.PROMPT_COMPLETION or "completion" in renamed
    completion = named["completion"] if known or named["completion"] in template.columns else template.completion
    check_completion_last(template, completion)
    return {column: column for column in template.columns}


def _filled(record: Record, shape: RecordShape, template: PromptTemplate) -> Example | BadRecord:
    for column in template.columns:
        value = record.fields.get(column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            continue
        problem = _text_problem(record, column, value, allow_empty=column != template.completion)
        if problem:
            return record.bad(problem, _mend(problem, "promptTemplate", column))
    prompt, completion = template.fill(record.fields)
    if shape.format is DataFormat.TEXT:
        return Example(record, (Turn("text", prompt + completion),))
    return Example(record, (Turn("prompt", prompt), Turn("completion", completion)))


def _conversation(record: Record, column: str) -> Example | BadRecord:
    messages = record.fields.get(column)
    if not isinstance(messages, list) or not messages:
        missing = column not in record.fields
        problem = _missing(record, column) if missing else f"{column} is {type_word(messages)}, not a list of messages"
        if messages == []:
            problem = f"{column} is an empty list"
        return record.bad(problem, f'Write {column} as [{{"role": "user", "content": "…"}}, …].')
    turns = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            return record.bad(f"message {number} has the role {str(role)[:40]!r}", f"Use the roles {', '.join(ROLES)}.")
        text = message.get("content")
        if not isinstance(text, str) or (role == "assistant" and not text.strip()):
            what = "is empty" if isinstance(text, str) else f"is {type_word(text)}, not text"
            return record.bad(f"the content of message {number} ({role}) {what}", "Give each message a text.")
        turns.append(Turn(role, text))
    if all(turn.role != "assistant" for turn in turns):
        return record.bad("no message of the assistant, so there is nothing to learn", "Add the assistant's answer.")
    return Example(record, tuple(turns))


def _text_problem(record: Record, column: str, value: Any, *, allow_empty: bool) -> str:
    if column not in record.fields:
        return _missing(record, column)
    if not isinstance(value, str):
        return f"column {column!r} is {type_word(value)}, not text"
    if not allow_empty and not value.strip():
        return f"column {column!r} is empty"
    return ""


def _mend(problem: str, role: str, column: str) -> str:
    if "there is no column" in problem and role != "promptTemplate":
        return f"Add the column {column!r} to each record, or name yours in dataset.columns.{role}."
    return f"Give each record a text in {column!r}."


def _missing(record: Record, column: str) -> str:
    return f"there is no column {column!r}; there are {_listed(record.fields)}"


def _listed(fields: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in fields]
    return (", ".join(names[:12]) + (" and more" if len(names) > 12 else "")) or "none"
