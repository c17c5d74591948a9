"""What guards have changed about the run: kept in status over all attempts, and told once each.

The trainer says it, so it is bounded: counts only grow, up to what the schema of the progress document allows.
"""

from __future__ import annotations

from finetune_api.status import Current, GuardChanges, Progress
from finetune_operator.actions import Event
from finetune_operator.decide.draft import Draft

ROLLED_BACK = "RolledBack"
MICRO_BATCH_HALVED = "MicroBatchHalved"


def tell(draft: Draft, current: Current) -> None:
    """Takes over what the attempt's progress says of guards; an event tells of each new rollback and halving."""
    progress = draft.seen.status.progress
    if progress is None or progress.attempt != current.number:
        return
    known = draft.status.guards or GuardChanges()
    after_interruption = bool(draft.seen.status.attempts) and draft.seen.status.attempts[-1].outcome == ROLLED_BACK
    changes: dict[str, object] = {}
    if (progress.rollbacks or 0) > known.rollbacks:
        changes |= {"rollbacks": progress.rollbacks, "last_rollback": progress.last_rollback}
        # The end of the attempt before was told as RolledBack already, with the guard's own words.
        if not after_interruption:
            draft.tell(Event("Warning", ROLLED_BACK, progress.last_rollback or "the run went back to a checkpoint"))
    smaller = _smaller_micro_batch(progress, known)
    if smaller is not None:
        changes["micro_batch_size"] = smaller
        if not after_interruption:
            draft.tell(Event("Warning", MICRO_BATCH_HALVED, _halved(draft, smaller)))
    if changes:
        # a decision of a guard is progress, also where it went back behind the newest checkpoint
        draft.set(guards=known.model_copy(update=changes), interruptions_without_checkpoint=None)


def _smaller_micro_batch(progress: Progress, known: GuardChanges) -> int | None:
    size = progress.micro_batch_size
    if size is None or size < 1 or (known.micro_batch_size is not None and size >= known.micro_batch_size):
        return None
    return size


def _halved(draft: Draft, size: int) -> str:
    plan = draft.status.plan
    planned = f" instead of {plan.micro_batch_size}" if plan is not None else ""
    return (
        f"the GPU ran out of memory: the micro batch is {size}{planned} from now on, with more accumulation, so that "
        "the effective batch stays as planned"
    )
