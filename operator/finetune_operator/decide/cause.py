"""Why something ended or does not start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A row of the failure table, what happened and where, the spec path to change, and the node it happened on."""

    failure_class: str
    message: str
    field: str | None = None
    node: str | None = None
