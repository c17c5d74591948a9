"""Jinja templates of a dataset: sandboxed, immutable, with bounded output, and split before the completion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.failures import FinetuneError
from finetune_trainer.data.template import FIELD, TemplateRefusal

MAX_CHARACTERS = 16 << 20
"""Longest text that a template may write."""
MAX_JOINED = 1 << 20
"""Longest text that one join may make: a chain of joins would grow with each link."""
# What keeps a text under a name could double it again and again.
_GROWING = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)
# fmt: off
_FILTERS = (
    "capitalize", "d", "default", "first", "float", "int", "join", "last", "length", "list", "lower", "map", "reject",
    "reverse", "round", "select", "sort", "string", "title", "trim", "truncate", "unique", "upper",
)
_METHODS = frozenset({
    "capitalize", "endswith", "find", "get", "items", "keys", "lower", "lstrip", "removeprefix",
    "removesuffix", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values",
})
# fmt: on


class _Environment(ImmutableSandboxedEnvironment):
    """No loop or text may grow beyond what the record itself holds: no range, no repetition, few filters."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=_printable, autoescape=False)
        self.globals.clear()
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers of ordinary size only: a text times a number fills the memory."""
        if not all(isinstance(value, int | float) and abs(value) < 1 << 32 for value in (left, right)):
            raise jinja2.TemplateRuntimeError(f"{operator!r} works on ordinary numbers only")
        if operator == "**" and abs(right) > 64:
            raise jinja2.TemplateRuntimeError("the exponent is too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_callable(self, obj: Any) -> bool:
        """The harmless methods of texts, lists and objects."""
        owner = getattr(obj, "__self__", None)
        return isinstance(owner, str | list | dict) and getattr(obj, "__name__", "") in _METHODS


class JinjaTemplate:
    """A compiled template. What it is split into: everything before the last expression, and that expression."""

    def __init__(self, tree: nodes.Template, environment: jinja2.Environment) -> None:
        names = meta.find_undeclared_variables(tree)
        self._environment = environment
        self._whole = environment.from_string(tree)
        self.tail, expression = _cut_last(tree)
        self.last = _column(expression) if expression is not None else None
        prompt_names = meta.find_undeclared_variables(tree)
        self.before = tuple(sorted(prompt_names))
        self.columns = tuple(sorted(names))
        self._prompt = environment.from_string(tree)
        output = [nodes.Output([expression])] if expression is not None else []
        completion = nodes.Template(output, lineno=1).set_environment(environment)
        self._completion = environment.from_string(completion)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The template; None if text is no Jinja."""
        environment = _Environment()
        try:
            tree = environment.parse(text)
            found = next(tree.find_all(_GROWING), None)
            if found is None:
                return cls(tree, environment)
        except jinja2.TemplateError:
            return None
        raise FinetuneError(
            f"dataset.promptTemplate, line {found.lineno}: set, macro, call and filter blocks are not allowed, because "
            "their texts could grow without bound. Write the expression where it is used.",
            failure_class="InvalidSpec",
            field=FIELD,
        )

    def split(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, completion): the text up to the last column, and that column's value with the tail."""
        return _render(self._prompt, fields), _render(self._completion, fields) + self.tail

    def whole(self, fields: Mapping[str, Any]) -> str:
        """The whole text."""
        return _render(self._whole, fields)


def jinja_template(text: str, columns: Mapping[str, Any]) -> JinjaTemplate | None:
    """The Jinja template; None if text is none, or names no column of the data."""
    template = JinjaTemplate.parse(text)
    if template is None or not any(column in columns for column in template.columns):
        return None
    return template


def _cut_last(tree: nodes.Template) -> tuple[str, nodes.Expr | None]:
    """Takes the last expression and the text behind it out of tree: (that text, the expression).

    The expression is None, and nothing is taken, if a block comes last.
    """
    tail = ""
    while tree.body and isinstance(output := tree.body[-1], nodes.Output):
        while output.nodes:
            node = output.nodes[-1]
            if not isinstance(node, nodes.TemplateData):
                output.nodes.pop()
                return tail, node
            tail = node.data + tail
            output.nodes.pop()
        tree.body.pop()
    if tail:
        tree.body.append(nodes.Output([nodes.TemplateData(tail)]).set_environment(tree.environment))
    return "", None


def _column(expression: nodes.Expr) -> str | None:
    """The column that an expression shows: a name, or a name through filters."""
    while isinstance(expression, nodes.Filter) and expression.node is not None:
        expression = expression.node
    return expression.name if isinstance(expression, nodes.Name) else None


def _render(template: jinja2.Template, fields: Mapping[str, Any]) -> str:
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate({str(name): value for name, value in fields.items()}):
            size += len(part)
            if size > MAX_CHARACTERS:
                raise TemplateRefusal(f"dataset.promptTemplate writes more than {MAX_CHARACTERS} characters")
            parts.append(part)
    except jinja2.UndefinedError as error:
        raise TemplateRefusal(f"dataset.promptTemplate names a column that is not there: {error.message}") from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        raise TemplateRefusal(f"dataset.promptTemplate refuses it: {error}") from None
    return "".join(parts)


def _printable(value: Any) -> Any:
    """Texts and numbers as they are; what would be printed as Python is refused."""
    if isinstance(value, jinja2.Undefined | str | int | float) and not isinstance(value, bool):
        return value
    word = "null" if value is None else f"a {type(value).__name__}"
    raise jinja2.TemplateRuntimeError(f"it prints {word}; use a filter such as join or tojson")


def _join(values: Any, separator: str = "") -> str:
    """The values as one text of at most MAX_JOINED characters."""
    texts = [str(value) for value in values]
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_JOINED:
        raise jinja2.TemplateRuntimeError(f"join makes more than {MAX_JOINED} characters")
    return separator.join(texts)


def _tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
