"""Lists of messages, as Messages and as ShareGPT write them, and what is wrong with one."""

from __future__ import annotations

from typing import Any

from finetune_trainer.data.formats import ROLES, Example, Turn
from finetune_trainer.data.readers import type_word
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.values import missing

# What others call the roles, mostly in ShareGPT's files.
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}


def conversation(record: Record, column: str, *, prompts: bool) -> Example | BadRecord:
    """The conversation in a column; with prompts it may end before the assistant's answer."""
    if column not in record.fields:
        return missing(record, "messages", column)
    turns = read_turns(record, column, record.fields[column])
    if isinstance(turns, BadRecord):
        return turns
    if not prompts and all(turn.role != "assistant" for turn in turns):
        return record.bad("no message of the assistant, so there is nothing to learn", "Add the assistant's answer.")
    if prompts and all(turn.role != "user" for turn in turns):
        return record.bad("no message of the user, so there is nothing to answer", "Add the user's question.")
    return Example(record, turns)


def read_turns(record: Record, column: str, messages: Any) -> tuple[Turn, ...] | BadRecord:
    """The turns of a list of messages: {role, content} or {from, value}."""
    if not isinstance(messages, list) or not messages:
        problem = f"{column} is {type_word(messages)}, not a list of messages"
        if messages == []:
            problem = f"{column} is an empty list"
        form = '[{"role": "user", "content": "…"}, …]'
        if column == "conversations":
            form = '[{"from": "human", "value": "…"}, …]'
        return record.bad(problem, f"Write {column} as {form}.")
    turns = []
    for number, message in enumerate(messages, 1):
        turn = _turn(record, number, message)
        if isinstance(turn, BadRecord):
            return turn
        turns.append(turn)
    return tuple(turns)


def _turn(record: Record, number: int, message: Any) -> Turn | BadRecord:
    fields = message if isinstance(message, dict) else {}
    share = "from" in fields and "role" not in fields
    said = fields.get("from" if share else "role")
    role = _ALIASES.get(str(said), said)
    if role not in ROLES:
        known = "human, gpt, system, tool" if share else ", ".join(ROLES)
        return record.bad(f"message {number} has the role {str(said)[:40]!r}", f"Use the roles {known}.")
    text = fields.get("value" if share else "content")
    if not isinstance(text, str) or (role == "assistant" and not text.strip()):
        what = "is empty" if isinstance(text, str) else f"is {type_word(text)}, not text"
        return record.bad(f"the content of message {number} ({said}) {what}", "Give each message a text.")
    return Turn(role, text)
