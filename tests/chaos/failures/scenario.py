"""What a seeded failure is: how it is made, and what the program that meets it has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.failures import TABLE, FailureClass
from tests.unit.operator.builders import a_spec

MAX_FAILURES = 2
SPEC = a_spec(retry={"maxFailures": MAX_FAILURES})
"""The spec of the FineTuneJob with which the operator meets a scenario."""


@dataclass(frozen=True)
class Ending:
    """What a program of ours left behind: its exit code and its last words; left: the text of its termination log."""

    exit_code: int
    failure_class: str
    message: str
    field: str | None
    left: str = ""


@dataclass(frozen=True)
class Scenario:
    """One seeded failure. says: words of the message; field: the spec path to change, None where there is none."""

    name: str
    failure_class: str
    field: str | None
    says: tuple[str, ...]
    make: Callable[[Place], Ending]

    @property
    def row(self) -> FailureClass:
        """Its row of the failure table."""
        return TABLE[self.failure_class]


@dataclass(frozen=True)
class Place:
    """Where a scenario happens: a folder of its own, an S3 server for all, and agents that end with the test."""

    folder: Path
    s3: Any
    agents: Any
    runs: Any


def scenario(name: str, failure_class: str, field: str | None, *says: str) -> Callable[[Any], Scenario]:
    """Makes a scenario of the function that seeds it."""
    return lambda make: Scenario(name, failure_class, field, says, make)
