"""spec.deadlineSeconds: the time from the first start to now, suspension not counted."""

from __future__ import annotations

from datetime import timedelta

from finetune_api.status import ConditionStatus, ConditionType, FineTuneJobStatus
from finetune_operator.clock import format_time, parse_time
from finetune_operator.decide.draft import Draft


def is_past(draft: Draft) -> bool:
    """Whether the deadline has passed; asks to look again when it will."""
    left = seconds_left(draft)
    if left is not None and left > 0:
        draft.look(left)
    return left is not None and left <= 0


def seconds_left(draft: Draft) -> float | None:
    """Seconds until the deadline; None without one, or before the first start."""
    status, limit = draft.seen.status, draft.spec.deadline_seconds
    if limit is None or status.start_time is None:
        return None
    used = (draft.seen.now - parse_time(status.start_time)).total_seconds() - suspended_seconds(status, draft.now)
    return limit - used


def end(draft: Draft) -> str:
    """The moment of the deadline, as it stands now; only where seconds_left knows it."""
    left = seconds_left(draft)
    assert left is not None, "asked for where there is a deadline"
    return format_time(draft.seen.now + timedelta(seconds=left + 0.5))  # rounded: it must not change by a fraction


def message(draft: Draft) -> str:
    """What to tell the owner."""
    return (
        f"the run took longer than spec.deadlineSeconds, {draft.spec.deadline_seconds} s from its first start, "
        "suspension not counted"
    )


def suspended_seconds(status: FineTuneJobStatus, now: str) -> int:
    """Seconds spent suspended since the first start, a suspension that lasts included."""
    total = status.suspended_seconds or 0
    resting = status.condition(ConditionType.SUSPENDED)
    if status.start_time is not None and resting is not None and resting.status == ConditionStatus.TRUE:
        total += max(0, int((parse_time(now) - parse_time(resting.last_transition_time)).total_seconds()))
    return total
