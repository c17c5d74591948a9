"""A job at its end: nothing runs any more, and the Jobs go when their time to live is over."""

from __future__ import annotations

from finetune_operator.actions import Delete
from finetune_operator.clock import parse_time
from finetune_operator.decide.draft import Draft


def keep(draft: Draft) -> None:
    """Jobs that still run stop; the last attempt's Job stays readable until spec.ttlSecondsAfterFinished."""
    children = (*draft.seen.preflights, *draft.seen.attempts)
    expired = _expired(draft)
    draft.do(
        *(
            Delete("Job", child.name, child.uid)
            for child in children
            if not child.deleting and (expired or child.finished is None)
        )
    )


def _expired(draft: Draft) -> bool:
    spec, completed = draft.seen.job.spec, draft.seen.status.completion_time
    if spec is None or spec.ttl_seconds_after_finished is None or completed is None:
        return False
    left = spec.ttl_seconds_after_finished - (draft.seen.now - parse_time(completed)).total_seconds()
    if left > 0:
        draft.look(left)
    return left <= 0
