"""The start of an attempt: its number is written down before anything is created."""

from __future__ import annotations

from finetune_api.status import ConditionType, Current, State
from finetune_operator.actions import Delete
from finetune_operator.clock import format_time, seconds_until
from finetune_operator.decide import deadline, history, planning, preflight, stopping
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.pods import waits_for_pods
from finetune_operator.snapshot import Snapshot


def next_attempt(draft: Draft) -> None:
    """Writes down the next attempt's number, once nothing speaks against it."""
    if stopping.before_next_attempt(draft):
        return
    _leave_suspension(draft)
    if _waits_for_backoff(draft) or waits_for_pods(draft):
        return
    plan = draft.status.plan
    assert plan is not None, "only a planned job starts attempts"
    if draft.seen.pool(plan.pool) is None:
        message = f"the GPUPool {plan.pool} does not exist any more; create it again or clone the job"
        draft.mark(ConditionType.QUEUED, TRUE, "Unschedulable", message)
        draft.be(State.QUEUED, message)
        draft.look(draft.config.retry_max_seconds)
        return
    if planning.run_file(draft) is None:
        return
    preflight.delete_jobs(draft)
    draft.do(*(Delete("Job", child.name, child.uid) for child in draft.seen.attempts if not child.deleting))
    number = next_number(draft.seen)
    draft.set(
        attempt=number,
        current=Current(number=number, start_time=format_time(draft.seen.now)),
        next_attempt_time=None,
    )
    draft.mark(ConditionType.QUEUED, TRUE, "Starting", f"attempt {number} is being set up")
    draft.mark(ConditionType.SCHEDULED, FALSE, "Starting")
    draft.mark(ConditionType.TRAINING, FALSE, "Starting")
    draft.be(State.QUEUED, f"attempt {number} is being set up on {plan.pool}")


def next_number(seen: Snapshot) -> int:
    """One more than any number that status or a child of ours carries: no number is used twice."""
    return max([seen.status.attempt or 0, *(child.number for child in seen.attempts)]) + 1


def _leave_suspension(draft: Draft) -> None:
    if draft.seen.status.is_true(ConditionType.SUSPENDED):
        history.account_for_rest(draft)
        draft.set(suspended_seconds=deadline.suspended_seconds(draft.seen.status, draft.now), next_attempt_time=None)
        draft.be(State.QUEUED, "resumed")


def _waits_for_backoff(draft: Draft) -> bool:
    until = draft.status.next_attempt_time
    if until is None:
        return False
    remaining = seconds_until(until, draft.seen.now)
    if remaining > 0:
        draft.look(remaining)
        return True
    return False
