"""The CRDs' CEL rules, checked on this machine: the same text that the API server evaluates.

Only the part of the language that `finetune_api.rules` uses: has(), ==, !=, in, !, &&, ||, matches(), text, numbers,
lists and brackets. A rule outside it raises ValueError, which a test checks for every rule.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(r"\s*(?:(&&|\|\||==|!=|[!()\[\],])|'((?:[^'\\]|\\.)*)'|(\d+(?:\.\d+)?)|([A-Za-z_][\w.]*))")


def holds(rule: str, value: Mapping[str, Any]) -> bool:
    """Whether value, as `self`, obeys the rule. Raises ValueError for a rule that is not understood."""
    parser = _Parser(rule, value)
    result = parser.either()
    if parser.peek() is not None or not isinstance(result, bool):
        raise ValueError(f"not understood: {rule}")
    return result


@functools.cache
def _tokens(rule: str) -> tuple[tuple[str, str], ...]:
    found, position = [], 0
    while position < len(rule.rstrip()):
        match = _TOKEN.match(rule, position)
        if match is None:
            raise ValueError(f"not understood at {rule[position:]!r}: {rule}")
        operator, text, number, name = match.groups()
        if operator is not None:
            found.append(("operator", operator))
        elif text is not None:
            found.append(("text", text))
        elif number is not None:
            found.append(("number", number))
        else:
            found.append(("name", name))
        position = match.end()
    return tuple(found)


class _Parser:
    """Evaluates while it reads; every side is read, so a short circuit never hides a fault in a rule."""

    def __init__(self, rule: str, value: Mapping[str, Any]) -> None:
        self._rule = rule
        self._tokens = _tokens(rule)
        self._at = 0
        self._value = value

    def peek(self) -> tuple[str, str] | None:
        """The next token without taking it; None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def either(self) -> Any:
        """The value of an expression down to `||`."""
        result = self._both()
        while self._take("||"):
            other = self._both()
            result = bool(result) or bool(other)
        return result

    def _both(self) -> Any:
        result = self._comparison()
        while self._take("&&"):
            other = self._comparison()
            result = bool(result) and bool(other)
        return result

    def _comparison(self) -> Any:
        left = self._single()
        if self._take("=="):
            return left == self._single()
        if self._take("!="):
            return left != self._single()
        if self.peek() == ("name", "in"):
            self._at += 1
            return left in self._single()
        return left

    def _single(self) -> Any:
        if self._take("!"):
            return not self._single()
        if self._take("("):
            result = self.either()
            self._expect(")")
            return result
        if self._take("["):
            return self._list()
        kind, text = self._next()
        if kind == "text":
            return text.replace("\\\\", "\\")
        if kind == "number":
            return float(text)
        if kind == "name" and text == "has":
            self._expect("(")
            found = self._lookup(self._next()[1])
            self._expect(")")
            return found is not None
        if kind == "name" and text.endswith(".matches"):
            self._expect("(")
            pattern = self._next()[1]
            self._expect(")")
            return re.search(pattern, str(self._lookup(text.removesuffix(".matches")))) is not None
        if kind == "name":
            return self._lookup(text)
        raise ValueError(f"not understood at {text!r}: {self._rule}")

    def _list(self) -> list[Any]:
        items = [self._single()]
        while self._take(","):
            items.append(self._single())
        self._expect("]")
        return items

    def _lookup(self, path: str) -> Any:
        first, *rest = path.split(".")
        if first != "self":
            raise ValueError(f"not understood at {path!r}: {self._rule}")
        found: Any = self._value
        for part in rest:
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def _next(self) -> tuple[str, str]:
        token = self.peek()
        if token is None:
            raise ValueError(f"ends too soon: {self._rule}")
        self._at += 1
        return token

    def _take(self, operator: str) -> bool:
        if self.peek() == ("operator", operator):
            self._at += 1
            return True
        return False

    def _expect(self, operator: str) -> None:
        if not self._take(operator):
            raise ValueError(f"{operator!r} expected: {self._rule}")
