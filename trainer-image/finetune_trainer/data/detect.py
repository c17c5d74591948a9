"""How a data set is read: from its settings, the objective and the columns of its first record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat, ObjectiveType, Task
from finetune_trainer.data.formats import (
    COLUMNS,
    JUDGED,
    RecordShape,
    answers_itself,
    fitting_formats,
    listed,
    needs,
    optional_roles,
)
from finetune_trainer.data.template import Template, check_completion_last, invalid, parse_template

_NAMED_BY_ALL = (DataFormat.ALPACA, DataFormat.QUESTION_ANSWER)


def resolve_shape(
    format: DataFormat | None,
    columns: Columns | None,
    prompt_template: str | None,
    first: Mapping[str, Any],
    *,
    objective: ObjectiveType = ObjectiveType.SUPERVISED,
    task: Task = Task.CAUSAL_LM,
) -> RecordShape:
    """The shape of a data set from its settings and the columns of its first record.

    Raises FinetuneError: InvalidSpec for a format or a template that does not fit the objective, DataInvalid when no
    format fits the columns.
    """
    renamed = {role: name for role, name in columns.model_dump().items() if name} if columns else {}
    template = parse_template(prompt_template, first) if prompt_template else None
    if format is not None:
        _check_fits(format, objective, task)
        reason = "set by dataset.format"
    else:
        format, reason = _detect(renamed, template, first, objective, task)
    judged = _is_judged(format, objective, renamed, first)
    roles = JUDGED if judged else COLUMNS[format]
    named = {role: _column(role, names, renamed, first) for role, names in roles.items()}
    optional = frozenset() if judged else optional_roles(format, objective)
    if template is not None:
        named = _with_template(format, named, renamed, template, objective, judged)
    return RecordShape(format, named, template, reason, optional, judged, answers_itself(objective))


def _check_fits(format: DataFormat, objective: ObjectiveType, task: Task) -> None:
    if format not in fitting_formats(objective, task):
        raise FinetuneError(
            f"dataset.format {format.value} does not fit: {needs(objective, task)}.",
            failure_class="InvalidSpec",
            field="spec.dataset.format",
        )


def _detect(
    renamed: Mapping[str, str],
    template: Template | None,
    first: Mapping[str, Any],
    objective: ObjectiveType,
    task: Task,
) -> tuple[DataFormat, str]:
    fitting = fitting_formats(objective, task)
    for format in fitting:
        needed = _needed(format, renamed, first, objective)
        if _is_judged(format, objective, renamed, first):
            needed = {role: _column(role, names, renamed, first) for role, names in JUDGED.items()}
        if needed is None and format is DataFormat.LABELS and template is not None:
            label = _column("label", COLUMNS[format]["label"], renamed, first)
            needed = {"label": label} if label in first else None
        if needed is None or not _told_apart(format, needed, renamed, first):
            continue
        if template is not None and not _ends_well(format, needed, template, objective):
            continue
        return format, _reason(format, list(needed.values()))
    if template is not None and DataFormat.PROMPT_COMPLETION in fitting:
        ends = f"ends with {{{template.last}}}" if template.last else "is set"
        return DataFormat.PROMPT_COMPLETION, f"read as PromptCompletion because dataset.promptTemplate {ends}"
    if template is not None and DataFormat.TEXT in fitting:
        return DataFormat.TEXT, "read as Text because dataset.promptTemplate is set"
    raise _unclear(renamed, first, objective, task)


def _needed(
    format: DataFormat, renamed: Mapping[str, str], first: Mapping[str, Any], objective: ObjectiveType
) -> dict[str, str] | None:
    """Role → column of what a record of the format must have; None if the first record lacks one of them."""
    optional = optional_roles(format, objective)
    roles = COLUMNS[format].items()
    needed = {role: _column(role, names, renamed, first) for role, names in roles if role not in optional}
    return needed if all(name in first for name in needed.values()) else None


def _column(role: str, names: tuple[str, ...], renamed: Mapping[str, str], first: Mapping[str, Any]) -> str:
    return renamed.get(role) or next((name for name in names if name in first), names[0])


def _is_judged(
    format: DataFormat, objective: ObjectiveType, renamed: Mapping[str, str], first: Mapping[str, Any]
) -> bool:
    """Whether KTO's records are completions with a label: pairs have both sides instead."""
    if format is not DataFormat.PREFERENCE or objective is not ObjectiveType.KTO:
        return False
    if _needed(format, renamed, first, objective) is not None:
        return False
    return all(_column(role, JUDGED[role], renamed, first) in first for role in ("completion", "label"))


def _told_apart(
    format: DataFormat, needed: Mapping[str, str], renamed: Mapping[str, str], first: Mapping[str, Any]
) -> bool:
    if "messages" in needed and "messages" in renamed:  # the role names the column of Messages and of ShareGPT
        return _is_share_gpt(first[needed["messages"]]) is (format is DataFormat.SHARE_GPT)
    # Alpaca and QuestionAnswer are known by names of their own: with all of them renamed nothing tells them apart.
    if format in _NAMED_BY_ALL and needed.keys() <= renamed.keys():
        return format is DataFormat.ALPACA and "input" in renamed
    return True


def _is_share_gpt(messages: Any) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and "from" in first


def _ends_well(format: DataFormat, needed: Mapping[str, str], template: Template, objective: ObjectiveType) -> bool:
    """Whether a template goes with a format that the columns alone would allow."""
    if format in (DataFormat.PREFERENCE, DataFormat.LABELS):
        return True
    if format in (DataFormat.TEXT, DataFormat.MESSAGES, DataFormat.SHARE_GPT, DataFormat.TAGS):
        return False
    return answers_itself(objective) or needed.get("completion") == template.last


def _reason(format: DataFormat, needed: list[str]) -> str:
    word = "columns" if len(needed) > 1 else "column"
    found = " and ".join([", ".join(needed[:-1]), needed[-1]] if needed[:-1] else needed)
    return f"read as {format.value} because the first record has the {word} {found}"


def _unclear(
    renamed: Mapping[str, str], first: Mapping[str, Any], objective: ObjectiveType, task: Task
) -> FinetuneError:
    looks_like = [format.value for format in COLUMNS if _needed(format, renamed, first, objective) is not None]
    guess, problem = "", "The format of the data is not clear"
    if looks_like:
        guess, problem = f", which looks like {looks_like[0]}", "The data does not fit the objective"
    return FinetuneError(
        f"{problem}: the first record has the columns {listed(first)}{guess}, but "
        f"{needs(objective, task)}. Rename the columns, name yours in dataset.columns, set dataset.promptTemplate, or "
        "choose another objective or model.task.",
        failure_class="DataInvalid",
        field="spec.dataset.columns",
    )


def _with_template(
    format: DataFormat,
    named: dict[str, str],
    renamed: Mapping[str, str],
    template: Template,
    objective: ObjectiveType,
    judged: bool,
) -> dict[str, str]:
    """Role → column where a template says how the text is put together."""
    if format in (DataFormat.MESSAGES, DataFormat.SHARE_GPT, DataFormat.TAGS):
        raise FinetuneError(
            f"dataset.promptTemplate cannot be used with {format.value}: the model's chat template puts conversations "
            "together, and tagged words stay as they are. Remove promptTemplate.",
            failure_class="InvalidSpec",
            field="spec.dataset.promptTemplate",
        )
    if format is DataFormat.TEXT:
        return {column: column for column in template.columns}
    if format is DataFormat.LABELS:
        if named["label"] in template.columns:
            raise invalid(f"shows the label {{{named['label']}}}, which is what the model has to find")
        return {"label": named["label"]}
    if format is DataFormat.PREFERENCE:
        check_completion_last(template, named["completion" if judged else "chosen"])
        return named
    # Columns of one's own need no dataset.columns when the template already says which one comes last.
    known = format is not DataFormat.PROMPT_COMPLETION or "completion" in renamed
    completion = named["completion"] if known or named["completion"] in template.columns else template.last
    if answers_itself(objective):
        return _prompt_columns(named["completion"], template)
    check_completion_last(template, completion or "completion")
    return {"completion": completion or ""}


def _prompt_columns(completion: str, template: Template) -> dict[str, str]:
    """For prompts that the model answers: the template may end with the wished completion or leave it out."""
    if template.last == completion:
        check_completion_last(template, completion)
        return {"completion": completion}
    if completion in template.columns:
        raise invalid(f"shows the wished completion {{{completion}}} in the prompt; use it at the end or not at all")
    return {}
