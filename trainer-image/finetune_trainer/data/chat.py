"""Conversations as text: the model's chat template, or a plain form where it has none.

The plain form is one `Role: content` line for each message and the end-of-text token after each answer:

    System: …
    User: …
    Assistant: …</s>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.failures import FinetuneError
from finetune_trainer.data.formats import Turn
from finetune_trainer.data.tokenizer import TextTokenizer

Span = tuple[int, int]
_PROBE = "Finetune probe"


class ChatError(Exception):
    """The template refuses a conversation or hides where an answer stands; the message says which."""


class ChatFormat:
    """Puts conversations together and tells where the answers stand."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = compile_template(tokenizer.chat_template) if tokenizer.chat_template else None

    @property
    def name(self) -> str:
        """For the report: which form is used."""
        return "the model's chat template" if self._template else "plain (User: … Assistant: …)"

    def render(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
        """The text of turns; with ask, up to where the model is to answer. Raises ChatError."""
        if self._template is None:
            return self._plain(turns, ask)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=ask, **self._tokenizer.variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise ChatError(f"the model's chat template refuses it: {error}") from None

    def answers(self, turns: Sequence[Turn], text: str) -> list[Span]:
        """The character range of each assistant turn in text = render(turns), its end-of-turn token included.

        A range begins where the model would begin to write. Raises ChatError if that cannot be told.
        """
        found: list[Span] = []
        cursor = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start = self._start(turns, number, text, cursor)
            answer = turn.text.rsplit("</think>", 1)[-1].strip()  # templates drop earlier turns' reasoning
            begin = text.find(answer, start)
            if begin < 0:
                raise ChatError(f"the model's chat template changes the text of message {number + 1}")
            cursor = self._end(text, begin + len(answer))
            found.append((start, cursor))
        return found

    @cached_property
    def stop(self) -> str | None:
        """The special token that ends an answer; None if the template writes none."""
        try:
            text = self.render([Turn("user", "Hello"), Turn("assistant", _PROBE)])
        except ChatError:
            return None
        tail = text.rpartition(_PROBE)[2].lstrip()
        return max((token for token in self._tokenizer.special if tail.startswith(token)), key=len, default=None)

    def _start(self, turns: Sequence[Turn], number: int, text: str, cursor: int) -> int:
        try:
            before = self.render(turns[:number], ask=True)
        except ChatError:
            before = None
        if before is not None and len(before) >= cursor and text.startswith(before):
            return len(before)
        # Some templates write earlier turns differently once later ones follow: look for the texts in their order.
        for turn in turns[_last_answer(turns, number) + 1 : number]:
            if turn.role == "user":
                at = text.find(turn.text.strip(), cursor)
                cursor = at + len(turn.text.strip()) if at >= 0 else cursor
        answer = turns[number].text.rsplit("</think>", 1)[-1].strip()
        at = text.find(answer, cursor)
        if at < 0:
            raise ChatError(f"the model's chat template does not show message {number + 1}")
        return at

    def _end(self, text: str, end: int) -> int:
        if self.stop is None:
            return end
        at = text.find(self.stop, end)
        return at + len(self.stop) if at >= 0 and not text[end:at].strip() else end

    def _plain(self, turns: Sequence[Turn], ask: bool) -> str:
        eos = self._tokenizer.variables["eos_token"]
        text = ""
        for turn in turns:
            end = eos if turn.role == "assistant" else ""
            text += f"{turn.role.capitalize()}: {turn.text.strip()}{end}\n"
        return text + ("Assistant:" if ask else "")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for other trainers; here it only has to be let through."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """A chat template in the sandbox and with the functions that transformers gives it; raises FinetuneError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise FinetuneError(
            f"The base model's chat template is broken: {error}. Set dataset.promptTemplate, or choose another model.",
            failure_class="ModelUnsupported",
            field="spec.model.uri",
        ) from None


def _last_answer(turns: Sequence[Turn], number: int) -> int:
    return max((k for k in range(number) if turns[k].role == "assistant"), default=-1)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
