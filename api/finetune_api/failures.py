"""The failure table: the one place that says what can go wrong and what follows.

The trainer's exit codes, the Job's podFailurePolicy, the operator's decisions, condition and event
reasons, metric labels and the runbook in docs/failures.md are all read from here. The rows are in `failure_rows`, the
texts of the runbooks in `runbooks`.
"""

from __future__ import annotations

from finetune_api.failure_rows import ANY, NEVER, ROWS, FailureClass, Fault
from finetune_api.guards import MAX_MICRO_BATCH_DIVISOR, MAX_ROLLBACKS

__all__ = [
    "ANY",
    "DEFAULT_MAX_FAILURES",
    "MAX_GUARD_DECISIONS",
    "MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT",
    "NEVER",
    "TABLE",
    "FailureClass",
    "Fault",
    "FinetuneError",
    "by_exit_code",
    "exit_codes",
]

TABLE: dict[str, FailureClass] = {row.name: row for row in ROWS}
_BY_EXIT_CODE = {row.exit_code: row for row in ROWS if row.exit_code is not None}

DEFAULT_MAX_FAILURES = 3
"""spec.retry.maxFailures where the job leaves it out."""
MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT = 5
MAX_GUARD_DECISIONS = MAX_ROLLBACKS + MAX_MICRO_BATCH_DIVISOR.bit_length() - 1
"""How many interruptions `RolledBack` one job can have: each rolls back, or halves the micro batch."""


def by_exit_code(code: int) -> FailureClass:
    """The class of a container's exit code; `OutOfHostMemory` is told by the kubelet's reason, not by 137."""
    return _BY_EXIT_CODE.get(code, TABLE["Unknown"])


def exit_codes() -> tuple[int, ...]:
    """All exit codes of the table in ascending order, for the Job's podFailurePolicy."""
    return tuple(sorted(_BY_EXIT_CODE))


class FinetuneError(Exception):
    """Base of every error that maps to a row of the table.

    Subclasses or callers set `failure_class` to the row's name; `field` is the spec path to change.
    The message says what happened, where, and what to do.
    """

    failure_class = "Internal"

    def __init__(self, message: str, *, failure_class: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        if failure_class is not None:
            self.failure_class = failure_class
        self.field = field

    @property
    def row(self) -> FailureClass:
        """This error's row of the failure table."""
        return TABLE[self.failure_class]
