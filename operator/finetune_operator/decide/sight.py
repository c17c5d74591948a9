"""The first sight of a job: everything is unknown, and says so."""

from __future__ import annotations

from finetune_api.status import State
from finetune_operator.actions import Decision
from finetune_operator.clock import format_time
from finetune_operator.decide.conditions import first_sight
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
