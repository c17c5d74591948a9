"""The runbook of each class of the failure table; docs/failures.md is made of them."""

from __future__ import annotations

from finetune_api.runbooks import inputs, interruptions, place, run
from finetune_api.runbooks.page import Runbook

__all__ = ["RUNBOOKS", "Runbook"]

RUNBOOKS: dict[str, Runbook] = {
    **inputs.RUNBOOKS,
    **run.RUNBOOKS,
    **place.RUNBOOKS,
    **interruptions.RUNBOOKS,
}
