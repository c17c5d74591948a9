"""promptTemplate: text with {column} in braces, or Jinja.

In the first form `{{` and `}}` stand for the braces themselves. A text is Jinja if it holds `{{` or `{%`, parses as
Jinja and names a column of the data: `{{"q": "{question}"}}` does not parse, so its braces are braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.failures import FinetuneError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}|[{}]")
FIELD = "spec.dataset.promptTemplate"


class TemplateRefusal(Exception):
    """A record that the template cannot be filled with; the message says why."""


class Template(Protocol):
    """What both forms of a template can do."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the order of their first use."""

    @property
    def last(self) -> str | None:
        """The column that comes last, as it is or through filters; None if something else comes last."""

    @property
    def tail(self) -> str:
        """The text that follows the last column."""

    @property
    def before(self) -> tuple[str, ...]:
        """The columns that are used before the last one."""

    def split(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, completion): the text up to the last column, and that column's value with the tail."""

    def whole(self, fields: Mapping[str, Any]) -> str:
        """The whole text. Both raise TemplateRefusal for a record that it cannot be filled with."""


@dataclass(frozen=True)
class BraceTemplate:
    """A parsed template with {column} in braces. pieces: (literal text, column that follows it) in order."""

    pieces: tuple[tuple[str, str], ...]
    tail: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the order of their first use."""
        return tuple(dict.fromkeys(column for _, column in self.pieces))

    @property
    def last(self) -> str | None:
        """The column that comes last."""
        return self.pieces[-1][1]

    @property
    def before(self) -> tuple[str, ...]:
        """The columns that are used before the last one."""
        return tuple(column for _, column in self.pieces[:-1])

    def split(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, completion): the text up to the last column, and that column's value with the tail."""
        prompt = "".join(literal + str(fields[column]) for literal, column in self.pieces[:-1]) + self.pieces[-1][0]
        return prompt, str(fields[self.pieces[-1][1]]) + self.tail

    def whole(self, fields: Mapping[str, Any]) -> str:
        """The whole text."""
        return "".join(self.split(fields))


def parse_template(text: str, columns: Mapping[str, Any]) -> Template:
    """The template for data with these columns; raises FinetuneError(InvalidSpec) for one that is broken or names a
    column that the data has not."""
    from finetune_trainer.data.jinja_template import jinja_template  # imports jinja2, which few jobs need here

    if ("{{" in text or "{%" in text) and (found := jinja_template(text, columns)) is not None:
        return found
    template = parse_braces(text)
    unknown = [column for column in template.columns if column not in columns]
    if unknown:
        raise invalid(f"names the column {unknown[0]!r}, but the data has {', '.join(map(str, columns)) or 'none'}")
    return template


def parse_braces(text: str) -> BraceTemplate:
    """Parse the {column} form; raises FinetuneError(InvalidSpec) for a lone brace or a text without a column."""
    pieces: list[tuple[str, str]] = []
    literal, end = "", 0
    for match in _PIECE.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        if match[1] is not None:
            pieces.append((literal, match[1].strip()))
            literal = ""
        elif match[0] in ("{{", "}}"):
            literal += match[0][0]
        else:
            raise invalid(f"has a lone {match[0]!r} at character {match.start() + 1}; write it twice to mean a brace")
    if not pieces:
        raise invalid("names no column; write a column's name in braces, such as {question}")
    return BraceTemplate(tuple(pieces), literal + text[end:])


def check_completion_last(template: Template, completion: str) -> None:
    """Raises FinetuneError(InvalidSpec) unless the completion comes last, and only there, with nothing after it."""
    if template.last != completion:
        ends = f"{{{template.last}}}" if template.last else "something that is no column"
        raise invalid(f"ends with {ends}, but the completion {{{completion}}} has to come last")
    if template.tail.strip():
        raise invalid(
            f"has the text {template.tail.strip()[:40]!r} after {{{completion}}}, which has to come last; "
            "the end-of-text token is added by itself"
        )
    if completion in template.before:
        raise invalid(f"shows the completion {{{completion}}} in the prompt too; use it once, at the end")


def invalid(why: str) -> FinetuneError:
    """The error for a template; why continues `dataset.promptTemplate`."""
    return FinetuneError(f"dataset.promptTemplate {why}.", failure_class="InvalidSpec", field=FIELD)
