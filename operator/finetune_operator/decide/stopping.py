"""Ends that somebody asked for: deletion, cancel, suspend, the deadline. And stops of an attempt in general.

A stop is written down (status.current.stopReason) before the Job is deleted, so that its absence is not taken for
somebody else's doing. Deleting the Job gives its pods their grace period, in which the trainer saves a checkpoint.
"""

from __future__ import annotations

from finetune_api.status import ConditionType, Current, State
from finetune_operator.actions import Decision, Delete
from finetune_operator.decide import deadline, ending, history, preflight
from finetune_operator.decide.conditions import FALSE
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.ending import CANCELLED, DEADLINE, SUSPENDED
from finetune_operator.decide.pods import waits_for_pods
from finetune_operator.snapshot import ChildJob, Snapshot

_SUSPENDED_MESSAGE = "suspended; set spec.suspend to false to go on from the newest checkpoint"


def for_deletion(seen: Snapshot) -> Decision:
    """The FineTuneJob is going: its Jobs stop now, even where somebody's finalizer still holds the job."""
    children = (*seen.preflights, *seen.attempts)
    return Decision(
        status=seen.status,
        actions=tuple(Delete("Job", child.name, child.uid) for child in children if not child.deleting),
    )


def before_plan(draft: Draft) -> bool:
    """Whether an unplanned job is to hold no pods: cancelled for good, or suspended until it is resumed."""
    if draft.seen.status.state == State.CANCELLED:
        preflight.delete_jobs(draft)
        return True
    if draft.seen.job.spec is None:
        return False
    if cancelled(draft):
        preflight.delete_jobs(draft)
        return True
    if draft.spec.suspend:
        preflight.delete_jobs(draft)
        draft.start_over()
        draft.be(State.SUSPENDED, "suspended before preflight; set spec.suspend to false to go on")
        return True
    return False


def before_next_attempt(draft: Draft) -> bool:
    """Whether the next attempt is not to start, because of cancel, the deadline or suspend."""
    if cancelled(draft) or _out_of_time(draft):
        return True
    if draft.spec.suspend:
        _rest(draft)
        return True
    return False


def cancelled(draft: Draft) -> bool:
    """Ends a job that was cancelled and has no attempt under way."""
    if not draft.spec.cancel:
        return False
    if not waits_for_pods(draft):
        history.account_for_rest(draft)
        draft.fail(State.CANCELLED, CANCELLED, "cancelled by spec.cancel; checkpoints are kept", "spec.cancel")
        draft.set(completion_time=draft.now, next_attempt_time=None)
    return True


def is_asked_for(draft: Draft) -> bool:
    """Whether cancel, suspend or the deadline ask for the end of what is under way."""
    return bool(draft.spec.cancel) or bool(draft.spec.suspend) or deadline.is_past(draft)


def begin_if_asked(draft: Draft, current: Current) -> bool:
    """Begins to stop the attempt under way where somebody asks for it."""
    if draft.spec.cancel:
        begin(draft, current, CANCELLED, "cancelled; the pods save a checkpoint and stop")
    elif draft.spec.suspend:
        begin(draft, current, SUSPENDED, "the pods save a checkpoint and stop")
    elif deadline.is_past(draft):
        begin(draft, current, DEADLINE, deadline.message(draft))
    else:
        return False
    return True


def begin(draft: Draft, current: Current, reason: str, message: str) -> None:
    """Writes down that the attempt is to stop, and why."""
    draft.set(current=current.model_copy(update={"stop_reason": reason}))
    draft.mark(ConditionType.TRAINING, FALSE, reason, message)
    asked = reason in (SUSPENDED, CANCELLED, DEADLINE)
    draft.be(State.SUSPENDING if asked else State.RETRYING, message)


def go_on(draft: Draft, current: Current, child: ChildJob | None) -> None:
    """Deletes the Job of an attempt that is to stop, waits until its pods are gone, and closes the attempt."""
    mine = child is not None and child.uid == current.job_uid
    if child is not None and mine and not child.deleting:
        draft.do(Delete("Job", child.name, child.uid))
    if mine or waits_for_pods(draft):
        draft.look(draft.config.poll_seconds)
        return
    ending.close(draft, current, ending.stop_cause(draft, current))


def _rest(draft: Draft) -> None:
    """Suspended, once no pod is left."""
    if waits_for_pods(draft):
        draft.be(State.SUSPENDING, "waiting for the pods to save and stop")
        return
    for kind in (ConditionType.QUEUED, ConditionType.SCHEDULED, ConditionType.TRAINING):
        draft.mark(kind, FALSE, SUSPENDED)
    draft.be(State.SUSPENDED, _SUSPENDED_MESSAGE)


def _out_of_time(draft: Draft) -> bool:
    if not deadline.is_past(draft):
        return False
    if not waits_for_pods(draft):
        history.account_for_rest(draft)
        draft.fail(State.FAILED, DEADLINE, deadline.message(draft), "spec.deadlineSeconds")
        draft.set(completion_time=draft.now, next_attempt_time=None)
    return True
