"""promptTemplate: text with {column} in braces. `{{` and `}}` stand for the braces themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}|[{}]")
FIELD = "spec.dataset.promptTemplate"


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template. pieces: (literal text, column that follows it) in order; tail: what follows the last one."""

    pieces: tuple[tuple[str, str], ...]
    tail: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the order of their first use."""
        return tuple(dict.fromkeys(column for _, column in self.pieces))

    @property
    def completion(self) -> str:
        """The column that comes last: what the model learns to write."""
        return self.pieces[-1][1]

    def fill(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, completion): the text up to the last column, and that column's value with the tail."""
        prompt = "".join(literal + str(fields[column]) for literal, column in self.pieces[:-1]) + self.pieces[-1][0]
        return prompt, str(fields[self.completion]) + self.tail


def parse_template(text: str) -> PromptTemplate:
    """Parse text; raises FinetuneError(InvalidSpec) for a lone brace or a template without a column."""
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
            raise _invalid(f"has a lone {match[0]!r} at character {match.start() + 1}; write it twice to mean a brace")
    if not pieces:
        raise _invalid("names no column; write a column's name in braces, such as {question}")
    return PromptTemplate(tuple(pieces), literal + text[end:])


def check_columns(template: PromptTemplate, columns: Mapping[str, Any]) -> None:
    """Raises FinetuneError(InvalidSpec) that lists the columns there are if the template names another."""
    unknown = [column for column in template.columns if column not in columns]
    if unknown:
        raise _invalid(f"names the column {unknown[0]!r}, but the data has {', '.join(map(str, columns)) or 'none'}")


def check_completion_last(template: PromptTemplate, completion: str) -> None:
    """Raises FinetuneError(InvalidSpec) unless the completion comes last, and only there, with nothing after it."""
    if template.completion != completion:
        raise _invalid(f"ends with {{{template.completion}}}, but the completion {{{completion}}} has to come last")
    if template.tail.strip():
        raise _invalid(
            f"has the text {template.tail.strip()[:40]!r} after {{{completion}}}, which has to come last; "
            "the end-of-text token is added by itself"
        )
    if any(column == completion for _, column in template.pieces[:-1]):
        raise _invalid(f"shows the completion {{{completion}}} in the prompt too; use it once, at the end")


def _invalid(why: str) -> FinetuneError:
    return FinetuneError(f"dataset.promptTemplate {why}.", failure_class="InvalidSpec", field=FIELD)
