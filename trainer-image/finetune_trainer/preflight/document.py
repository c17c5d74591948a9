"""Findings, and the preflight document as a termination message."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.documents import TERMINATION_BYTES
from finetune_api.failures import TABLE, FinetuneError
from finetune_api.status import Finding, Preflight

INFO = "Info"
MAX_MESSAGE = 3000
_MIN_MESSAGE = 240


def finding(error: FinetuneError) -> Finding:
    """The finding that tells of error."""
    return Finding(
        failure_class=error.failure_class, message=str(error)[:MAX_MESSAGE] or error.failure_class, field=error.field
    )


def remark(message: str, field: str | None = None) -> Finding:
    """A finding that stops nothing."""
    return Finding(failure_class=INFO, message=message[:MAX_MESSAGE], field=field)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """The most important first: what a person has to mend, then what another try may mend, then remarks."""

    def rank(item: Finding) -> int:
        row = TABLE.get(item.failure_class)
        return 2 if row is None else int(row.retriable)

    return sorted(findings, key=rank)


def exit_code(preflight: Preflight) -> int:
    """0 if nothing stands in the way, else the exit code of the first finding's class."""
    if preflight.ok:
        return 0
    return TABLE[preflight.findings[0].failure_class].exit_code or TABLE["Internal"].exit_code or 1


def encode_preflight(preflight: Preflight, limit: int = TERMINATION_BYTES) -> bytes:
    """At most limit bytes of JSON: long messages are shortened first, then the last findings left out.

    findingsTotal says how many there were.
    """
    document = preflight.model_copy(update={"findings_total": len(preflight.findings)})
    while len(data := document.model_dump_json(by_alias=True, exclude_none=True).encode()) > limit:
        document = document.model_copy(update={"findings": _less(document.findings)})
    return data


def _less(findings: list[Finding]) -> list[Finding]:
    longest = max(range(len(findings)), key=lambda k: len(findings[k].message))
    message = findings[longest].message
    if len(message) <= _MIN_MESSAGE and len(findings) > 1:
        return findings[:-1]
    shorter = findings[longest].model_copy(update={"message": message[: len(message) * 3 // 4] + "…"})
    return [*findings[:longest], shorter, *findings[longest + 1 :]]
