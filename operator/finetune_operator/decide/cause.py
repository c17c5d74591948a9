"""Why something ended or does not start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A row of the failure table, what happened and where, and the spec path to change."""

    failure_class: str
    message: str
    field: str | None = None
