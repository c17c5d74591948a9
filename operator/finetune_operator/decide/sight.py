"""The first sight of a job, when everything is unknown; and a planned job that this release cannot read."""

from __future__ import annotations

from finetune_api.status import State
from finetune_operator.actions import Decision
from finetune_operator.clock import format_time
from finetune_operator.decide.conditions import first_sight
from finetune_operator.decide.draft import Draft
from finetune_operator.snapshot import Snapshot


def first(seen: Snapshot) -> Decision:
    """All conditions exist from now on."""
    status = seen.status.model_copy(
        update={
            "observed_generation": seen.job.generation,
            "conditions": first_sight(seen.job.generation, format_time(seen.now)),
            "state": State.PENDING,
            "message": "looking at the job",
        }
    )
    return Decision(status=status)


def unreadable(draft: Draft) -> None:
    """A planned run whose spec another release wrote is left alone, and the message says what cannot be read."""
    field, why = draft.seen.job.spec_error or ("spec", "unknown")
    state = draft.seen.status.state or State.PENDING
    draft.be(state, f"this release of the operator cannot read {field} ({why}); the run is left alone")
