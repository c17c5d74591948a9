"""Reads what pods wrote as hostile input: bounded, strict, and cleaned before a person sees it."""

from __future__ import annotations

import re

from pydantic import ValidationError

from finetune_api.documents import TERMINATION_BYTES, TerminationMessage
from finetune_api.failures import TABLE
from finetune_api.status import Finding, Preflight

INFO = "Info"
SUCCEEDED = "Succeeded"
LARGEST = 2**53  # what every JSON reader keeps exactly
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MODEL_NUMBERS = ("parameters", "weight_bytes", "hidden_size", "layers", "vocabulary_size")
_DATA_NUMBERS = ("rows", "bad_rows", "tokens", "longest_tokens", "p95_tokens", "bytes")


def clean(text: str) -> str:
    """The text without control characters, escape sequences and marks that turn the writing direction."""
    return _CONTROL.sub(" ", text).strip()


def read_termination(text: str) -> TerminationMessage | None:
    """The agent's last words; None where they are not a document of ours."""
    if not text or len(text.encode()) > TERMINATION_BYTES:
        return None
    try:
        found = TerminationMessage.model_validate_json(text, strict=True)
    except ValidationError:
        return None
    # Only what a process of ours ends with: Cancelled or QuotaExceeded are not a pod's to tell.
    row = TABLE.get(found.outcome)
    if found.outcome != SUCCEEDED and (row is None or row.exit_code is None):
        return None
    field = clean(found.field) if found.field else None
    return found.model_copy(update={"message": clean(found.message), "field": field})


def read_preflight(text: str, spec_digest: str) -> Preflight | None:
    """What preflight found; None where it is not a document of ours, or speaks of another spec."""
    if not text or len(text.encode()) > TERMINATION_BYTES:
        return None
    try:
        found = Preflight.model_validate_json(text, strict=True)
    except ValidationError:
        return None
    if found.spec_digest != spec_digest or not _sane(found):
        return None
    blocking = [item for item in found.findings if item.failure_class != INFO]
    if found.ok and (blocking or found.model is None or found.data is None):
        return None
    if not found.ok and not blocking:
        return None
    return found.model_copy(update={"findings": [_finding(item) for item in found.findings]})


def _finding(item: Finding) -> Finding:
    known = item.failure_class == INFO or item.failure_class in TABLE
    return item.model_copy(
        update={
            "failure_class": item.failure_class if known else "Unknown",
            "message": clean(item.message) or "(no message)",
            "field": clean(item.field) if item.field else None,
        }
    )


def _sane(found: Preflight) -> bool:
    numbers: list[int] = [found.findings_total, *found.further_weight_bytes.values()]
    if found.model is not None:
        numbers += [getattr(found.model, name) for name in _MODEL_NUMBERS]
        numbers += [found.model.max_positions or 0, found.model.experts or 0]
    if found.data is not None:
        numbers += [getattr(found.data, name) for name in _DATA_NUMBERS]
    return all(0 <= number <= LARGEST for number in numbers)
