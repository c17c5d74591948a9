"""What a record stands for: the formats, their columns, and which of them an objective on a task can learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.job import DataFormat, ObjectiveType, Task
from finetune_trainer.data.records import Record
from finetune_trainer.data.template import Template

# What a role's column is called in each format; the first name that a record has counts. The order is that in which
# formats are tried.
COLUMNS: dict[DataFormat, dict[str, tuple[str, ...]]] = {
    DataFormat.PREFERENCE: {"prompt": ("prompt",), "chosen": ("chosen",), "rejected": ("rejected",)},
    DataFormat.TAGS: {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags")},
    DataFormat.LABELS: {"text": ("text",), "label": ("label",)},
    DataFormat.MESSAGES: {"messages": ("messages",)},
    DataFormat.SHARE_GPT: {"messages": ("conversations",)},
    DataFormat.ALPACA: {"prompt": ("instruction",), "input": ("input",), "completion": ("output",)},
    DataFormat.QUESTION_ANSWER: {"prompt": ("question",), "completion": ("answer",)},
    DataFormat.PROMPT_COMPLETION: {"prompt": ("prompt",), "completion": ("completion",)},
    DataFormat.TEXT: {"text": ("text",)},
}
JUDGED: dict[str, tuple[str, ...]] = {"prompt": ("prompt",), "completion": ("completion",), "label": ("label",)}
"""The other form of Preference, for KTO: one completion and whether it is a good one."""
ROLES = ("system", "user", "assistant", "tool")

_ASKING = (DataFormat.ALPACA, DataFormat.QUESTION_ANSWER, DataFormat.PROMPT_COMPLETION)
_TALKING = (DataFormat.MESSAGES, DataFormat.SHARE_GPT, *_ASKING)
_PAIRS = (ObjectiveType.REWARD, ObjectiveType.DPO, ObjectiveType.ORPO, ObjectiveType.KTO)
_PROMPTS = (ObjectiveType.PPO, ObjectiveType.GRPO)
_BY_TASK: dict[Task, tuple[DataFormat, ...]] = {
    Task.CAUSAL_LM: (*_TALKING, DataFormat.TEXT),
    Task.SEQ2SEQ: (*_ASKING, DataFormat.TEXT),
    Task.MASKED_LM: (DataFormat.TEXT,),
    Task.SEQUENCE_CLASSIFICATION: (DataFormat.LABELS,),
    Task.TOKEN_CLASSIFICATION: (DataFormat.TAGS,),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of an example. role: one of ROLES in a conversation; `prompt`, `completion` or `text` where the text is
    used as it stands."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: a conversation, a filled template (prompt, completion), or plain text.

    Preference: turns is the prompt, chosen and rejected are the two ways to go on, each with at least one turn that
    ends with an `assistant` or a `completion`. KTO: one of chosen and rejected is empty, and label is "true" (chosen
    is the completion) or "false" (rejected is it). Labels: turns is one `text`, label its class. Tags: words and tags,
    one of each; turns is empty. PPO and GRPO: turns is the prompt, and behind it the wished completion, a turn of role
    `assistant` or `completion`, where the data has one.
    """

    record: Record
    turns: tuple[Turn, ...]
    chosen: tuple[Turn, ...] = ()
    rejected: tuple[Turn, ...] = ()
    label: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        """Of all its texts."""
        turns = (*self.turns, *self.chosen, *self.rejected)
        return sum(len(turn.text) for turn in turns) + sum(len(word) for word in self.words)


@dataclass(frozen=True)
class RecordShape:
    """How records are read. columns: role → column. reason: why this format, for status and report.

    optional: roles that a record may lack. judged: Preference as one completion and its label. prompts: the model itself
    is to answer, so that a record without a completion is whole.
    """

    format: DataFormat
    columns: Mapping[str, str]
    template: Template | None
    reason: str
    optional: frozenset[str] = frozenset()
    judged: bool = False
    prompts: bool = False


def fitting_formats(objective: ObjectiveType, task: Task) -> tuple[DataFormat, ...]:
    """The formats that an objective on a task can learn from, in the order in which they are tried."""
    if objective in _PAIRS:
        return (DataFormat.PREFERENCE,)
    if objective in _PROMPTS:
        return _TALKING
    if objective is ObjectiveType.PRETRAIN:
        return (DataFormat.TEXT,)
    return _BY_TASK[task]


def optional_roles(format: DataFormat, objective: ObjectiveType) -> frozenset[str]:
    """The roles of a format that a record may lack: Alpaca's input, a pair's prompt, the completion of a prompt that
    the model itself is to answer."""
    if format is DataFormat.PREFERENCE:
        return frozenset({"prompt"})
    optional = {"input"} & COLUMNS[format].keys()
    if objective in _PROMPTS:
        optional |= {"completion"} & COLUMNS[format].keys()
    return frozenset(optional)


def needs(objective: ObjectiveType, task: Task) -> str:
    """For people: what records an objective on a task needs, with the columns of each format."""
    formats = fitting_formats(objective, task)
    listed = [f"{form.value} ({_columns_of(form, objective)})" for form in formats]
    if objective is ObjectiveType.KTO:
        listed.append(f"{DataFormat.PREFERENCE.value} ({', '.join(JUDGED)}: true or false)")
    who = f"objective {objective.value}" if objective is not ObjectiveType.SUPERVISED else f"a {task.value} model"
    if objective is ObjectiveType.PRETRAIN:
        who = "running text (objective Pretrain or pretrain.blockSize)"
    return f"{who} needs {' or '.join(listed)}"


def answers_itself(objective: ObjectiveType) -> bool:
    """Whether a record is a prompt that the model itself answers (PPO, GRPO)."""
    return objective in _PROMPTS


def _columns_of(format: DataFormat, objective: ObjectiveType) -> str:
    optional = optional_roles(format, objective)
    return ", ".join(names[0] for role, names in COLUMNS[format].items() if role not in optional)


def listed(fields: Mapping[str, Any]) -> str:
    """The names of a record's columns, for people; long ones cut and at most twelve."""
    names = [str(name)[:40] for name in fields]
    return (", ".join(names[:12]) + (" and more" if len(names) > 12 else "")) or "none"
