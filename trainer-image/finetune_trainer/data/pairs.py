"""Preference records: two ways to go on, or one and a verdict. The prompt may be what both sides have in common."""

from __future__ import annotations

from finetune_trainer.data.conversation import read_turns
from finetune_trainer.data.formats import Example, RecordShape, Turn
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.values import absent, as_list, filled, missing, text_of, verdict_of

_SIDES = ("chosen", "rejected")
Turns = tuple[Turn, ...]


def pair(record: Record, shape: RecordShape) -> Example | BadRecord:
    """The prompt of a record and its two completions."""
    for role in _SIDES:
        if shape.columns[role] not in record.fields:
            return missing(record, role, shape.columns[role])
    if shape.template is not None:
        found = _templated(record, shape)
    elif as_list(record, shape.columns["chosen"]) is not None:
        found = _talks(record, shape)
    else:
        found = _texts(record, shape)
    if isinstance(found, BadRecord):
        return found
    if found.chosen == found.rejected:
        return record.bad("chosen and rejected are equal", "Leave the record out, or correct one of the two.")
    return found


def judged(record: Record, shape: RecordShape) -> Example | BadRecord:
    """A prompt, one completion, and whether it is a good one."""
    good = verdict_of(record, shape.columns["label"])
    if isinstance(good, BadRecord):
        return good
    column = shape.columns["completion"]
    prompt: Turns | BadRecord
    completion: Turns | BadRecord
    if shape.template is not None:
        texts = filled(record, shape, column)
        if isinstance(texts, BadRecord):
            return texts
        prompt, completion = (Turn("prompt", texts[0]),), (Turn("completion", texts[1]),)
    else:
        prompt = _prompt(record, shape.columns["prompt"])
        completion = _side(record, "completion", column)
    if isinstance(prompt, BadRecord):
        return prompt
    if isinstance(completion, BadRecord):
        return completion
    return _one_side(record, prompt, completion, good)


def apart(example: Example) -> list[Example]:
    """A pair as two judged completions, as KTO learns from them."""
    return [
        _one_side(example.record, example.turns, example.chosen, True),
        _one_side(example.record, example.turns, example.rejected, False),
    ]


def _one_side(record: Record, prompt: Turns, completion: Turns, good: bool) -> Example:
    return Example(
        record,
        prompt,
        chosen=completion if good else (),
        rejected=() if good else completion,
        label="true" if good else "false",
    )


def _templated(record: Record, shape: RecordShape) -> Example | BadRecord:
    """The template ends with the chosen completion; the rejected one is put in its place."""
    chosen, rejected = shape.columns["chosen"], shape.columns["rejected"]
    for role in _SIDES:
        found = text_of(record, role, shape.columns[role])
        if isinstance(found, BadRecord):
            return found
    one = filled(record, shape, chosen)
    swapped = Record(record.source, record.file, record.row, {**record.fields, chosen: record.fields[rejected]})
    other = filled(swapped, shape, chosen)
    if isinstance(one, BadRecord):
        return one
    if isinstance(other, BadRecord):
        return other
    sides = ((Turn("completion", text),) for text in (one[1], other[1]))
    return Example(record, (Turn("prompt", one[0]),), *sides)


def _texts(record: Record, shape: RecordShape) -> Example | BadRecord:
    """Both completions as texts. Without a prompt it is what they have in common, up to the last white space."""
    texts = [text_of(record, role, shape.columns[role]) for role in _SIDES]
    for found in texts:
        if isinstance(found, BadRecord):
            return found
    chosen, rejected = (str(found) for found in texts)
    if not absent(record, shape, "prompt"):
        prompt = _prompt(record, shape.columns["prompt"])
        if isinstance(prompt, BadRecord):
            return prompt
        return Example(record, prompt, (Turn("assistant", chosen),), (Turn("assistant", rejected),))
    if chosen == rejected:
        return Example(record, (), (Turn("completion", chosen),), (Turn("completion", rejected),))
    end = _common(chosen, rejected)
    if not chosen[:end].strip() or not chosen[end:].strip() or not rejected[end:].strip():
        return record.bad(
            f"there is no column {shape.columns['prompt']!r}, and the two completions do not begin with one prompt",
            f"Add the column {shape.columns['prompt']!r}, or name yours in dataset.columns.prompt.",
        )
    sides = ((Turn("completion", text[end:]),) for text in (chosen, rejected))
    return Example(record, (Turn("prompt", chosen[:end]),), *sides)


def _talks(record: Record, shape: RecordShape) -> Example | BadRecord:
    """Both completions as lists of messages, which may begin with the prompt."""
    both: list[Turns] = []
    for role in _SIDES:
        found = _side(record, role, shape.columns[role])
        if isinstance(found, BadRecord):
            return found
        both.append(found)
    chosen, rejected = both
    same = 0
    # At least the last message of each side is a completion.
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    common = chosen[:same]
    if not absent(record, shape, "prompt"):
        prompt = _prompt(record, shape.columns["prompt"])
        if isinstance(prompt, BadRecord):
            return prompt
        if common[-len(prompt) :] != prompt:
            common = prompt + common
    if all(turn.role != "user" for turn in common):
        return record.bad(
            "chosen and rejected have no message of the user in common, so there is no prompt",
            f"Begin both with the same messages, or add the column {shape.columns['prompt']!r}.",
        )
    return Example(record, common, chosen[same:], rejected[same:])


def _side(record: Record, role: str, column: str) -> Turns | BadRecord:
    """A completion as turns, the last one the assistant's: from a list of messages or a text."""
    messages = as_list(record, column)
    if messages is None:
        text = text_of(record, role, column)
        return text if isinstance(text, BadRecord) else (Turn("assistant", text),)
    turns = read_turns(record, column, messages)
    if not isinstance(turns, BadRecord) and turns[-1].role != "assistant":
        return record.bad(f"{column} does not end with the assistant", "End it with the assistant's message.")
    return turns


def _prompt(record: Record, column: str) -> Turns | BadRecord:
    """A prompt as turns: from a list of messages or a text."""
    messages = as_list(record, column)
    if messages is not None:
        return read_turns(record, column, messages)
    text = text_of(record, "prompt", column)
    return text if isinstance(text, BadRecord) else (Turn("user", text),)


def _common(one: str, other: str) -> int:
    """How many letters two texts have in common, up to the last white space: no word is torn."""
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return max((k for k in range(same) if one[k].isspace()), default=-1) + 1
