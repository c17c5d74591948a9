"""The record of every resolved setting and why it has its value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune_api.base import Document
from finetune_api.status import Setting

T = TypeVar("T")
SET_BY_JOB = "set by the job"


@dataclass
class Ledger:
    """Collects the resolved settings with their reasons.

    The same records become status.plan.settings, the report and the lines that the trainer prints at its start.
    """

    settings: list[Setting] = field(default_factory=list)

    def pick(self, name: str, given: T | None, chosen: T, reason: str) -> T:
        """The given value if there is one, else the chosen one; either is recorded."""
        value = chosen if given is None else given
        self._record(name, value, SET_BY_JOB if given is not None else reason)
        return value

    def keep(self, name: str, given: T | None) -> T | None:
        """The given value, recorded where there is one. For what is off or left to the model when absent."""
        if given is not None:
            self._record(name, given, SET_BY_JOB)
        return given

    def state(self, name: str, value: object, reason: str) -> None:
        """Record what follows from other settings."""
        self._record(name, value, reason)

    def _record(self, name: str, value: Any, reason: str) -> None:
        self.settings.append(Setting(name=name, value=_plain(value), reason=reason))


def _plain(value: Any) -> Any:
    if isinstance(value, Document):
        return value.to_json()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if hasattr(value, "value") else value
