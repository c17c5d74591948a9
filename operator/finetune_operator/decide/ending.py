"""The end of an attempt: its outcome, what it counts as, and what follows.

Interruptions never count as failures, but five in a row without a new checkpoint end the job. An attempt that found no
room uses up no retry. Every other failure does, and is repeated as often as its class and the job allow.
"""

from __future__ import annotations

from finetune_api.failures import MAX_GUARD_DECISIONS, MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT, TABLE, Fault
from finetune_api.job import TuningType
from finetune_api.status import Artifacts, ConditionType, Current, State
from finetune_operator.clock import after
from finetune_operator.decide import guarding, history
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.documents import SUCCEEDED, read_termination
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.evidence import cause_of_failure, lost_node
from finetune_operator.decide.history import Known
from finetune_operator.snapshot import ChildJob

# Stops that somebody asked for: what follows them is decided from the spec once the attempt is closed.
SUSPENDED = "Suspended"
CANCELLED = "Cancelled"
DEADLINE = "DeadlineExceeded"
ASKED_FOR = (SUSPENDED, CANCELLED, DEADLINE)


def finished(draft: Draft, current: Current, child: ChildJob) -> None:
    """The Job is Complete or Failed."""
    if child.finished == "Complete":
        _succeed(draft, current, child)
    elif current.stop_reason is not None:
        close(draft, current, stop_cause(draft, current))
    else:
        pods = draft.seen.pods_of(child.uid)
        node_lost = current.avoid_node or lost_node(pods, draft.seen.unreachable_nodes)
        close(draft, current, cause_of_failure(child, pods, node_lost))


def close(draft: Draft, current: Current, cause: Cause) -> None:
    """The attempt is over and will be followed by another one, by a rest, or by the end of the job."""
    known = history.known_of(draft, current)
    guarding.tell(draft, current)
    history.record(draft, current, cause.failure_class, known, avoid_node=_node_to_avoid(current, cause))
    draft.mark(ConditionType.TRAINING, FALSE, cause.failure_class, cause.message)
    draft.mark(ConditionType.SCHEDULED, FALSE, cause.failure_class)
    if cause.failure_class in ASKED_FOR:
        draft.be(State.SUSPENDING, "the attempt has stopped")
        return
    row = TABLE[cause.failure_class]
    if row.fault == Fault.INTERRUPTION:
        _interrupted(draft, cause, in_vain=_in_vain(draft, known))
    elif row.waits_for_room:
        _again(draft, cause, "no retry is used up", nth=history.tries_without_room(draft.seen.status.attempts))
    else:
        if row.keeps_artifact:
            draft.set(artifacts=_artifacts(draft, current.job_uid))
        _failed(draft, cause)


def stop_cause(draft: Draft, current: Current) -> Cause:
    """Why the attempt was stopped, with what was told when the stop began."""
    reason, failure = str(current.stop_reason), draft.seen.status.failure
    if reason not in ASKED_FOR and failure is not None and failure.failure_class == reason:
        return Cause(reason, failure.message, failure.field)
    # A release before this one may have begun the stop, with a class that is gone.
    return Cause(reason if reason in TABLE or reason in ASKED_FOR else "Unknown", "")


def could_not_start(draft: Draft, cause: Cause) -> None:
    """The API server refused the attempt's Job or one of its children."""
    if TABLE[cause.failure_class].retriable:
        draft.mark(ConditionType.QUEUED, TRUE, cause.failure_class, cause.message)
        draft.be(State.QUEUED, f"the attempt cannot be created: {cause.message}")
        draft.look(draft.config.retry_base_seconds)
        return
    current = draft.seen.status.current
    assert current is not None, "there is an attempt under way"
    close(draft, current, cause)


def _succeed(draft: Draft, current: Current, child: ChildJob) -> None:
    artifacts = _artifacts(draft, child.uid)
    draft.set(artifacts=artifacts, completion_time=draft.now, failure=None, next_attempt_time=None)
    guarding.tell(draft, current)
    history.record(draft, current, SUCCEEDED, history.known_of(draft, current))
    draft.be(State.SUCCEEDED, f"done: the result is at {artifacts.uri}", reason="Completed")


def _artifacts(draft: Draft, job_uid: str | None) -> Artifacts:
    """Where the results are, by the spec and the last words of the pod with index 0."""
    messages = [read_termination(pod.termination_message) for pod in draft.seen.pods_of(job_uid) if pod.index == 0]
    said = next((message for message in messages if message is not None), None)
    output = draft.spec.output
    uri, tuning = output.uri.rstrip("/"), draft.spec.tuning_type
    whole = f"{uri}/model" if tuning == TuningType.FULL else None
    return Artifacts(
        uri=uri,
        adapter=f"{uri}/adapter" if tuning not in (None, TuningType.FULL) else None,
        model=f"{uri}/merged" if output.merge_adapter else whole,
        report=f"{uri}/report.md",
        published=output.publish.uri if output.publish is not None else None,
        base_eval_loss=said.base_eval_loss if said is not None else None,
        eval_loss=said.eval_loss if said is not None else None,
    )


def _node_to_avoid(current: Current, cause: Cause) -> str | None:
    if current.avoid_node is not None:
        return current.avoid_node
    row = TABLE.get(cause.failure_class)
    return cause.node if row is not None and row.avoids_node else None


def _in_vain(draft: Draft, known: Known) -> int:
    """How many interruptions in a row there were since the newest checkpoint, the one before this attempt included."""
    in_vain = draft.status.interruptions_without_checkpoint or 0
    saved, resumed = history.saved_step(draft.seen.status.attempts), known.resumed_from_step
    before = max((step for step in (saved, resumed) if step is not None), default=-1)
    if known.checkpoint_step is not None and known.checkpoint_step > before:
        return 0
    if saved is not None and resumed is not None and resumed > saved:
        return min(in_vain, 1)  # an attempt before stored it in its last moments, when nobody asked it any more
    return in_vain


def _interrupted(draft: Draft, cause: Cause, *, in_vain: int) -> None:
    status = draft.status
    in_a_row = in_vain + 1
    if cause.failure_class == guarding.ROLLED_BACK and status.endings[cause.failure_class] <= MAX_GUARD_DECISIONS:
        in_a_row = 0  # a decision of a guard is progress: the next attempt runs with other settings
    draft.set(interruptions=(status.interruptions or 0) + 1, interruptions_without_checkpoint=in_a_row)
    if in_a_row >= MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT:
        message = f"{in_a_row} interruptions in a row without a new checkpoint; the last: {cause.message}"
        _end(draft, Cause("NoProgress", message))
    else:
        _again(draft, cause, "an interruption uses up no retry", nth=max(1, in_a_row))


def _failed(draft: Draft, cause: Cause) -> None:
    row = TABLE[cause.failure_class]
    failures = (draft.seen.status.failures or 0) + 1
    like_this = draft.status.endings[row.name]
    draft.set(failures=failures)
    if not row.retriable:
        _end(draft, cause)
    elif failures > draft.max_failures:
        _end(draft, Cause(row.name, f"failed {failures} times; the last: {cause.message}", cause.field))
    elif like_this > row.retries:
        message = f"{row.name} came {like_this} times and is retried at most {row.retries}×; the last: {cause.message}"
        _end(draft, Cause(row.name, message, cause.field))
    else:
        bound = min(row.retries, draft.max_failures)
        _again(draft, cause, f"this was failure {failures}; {row.name} is retried at most {bound}×", nth=failures)


def _again(draft: Draft, cause: Cause, cost: str, *, nth: int) -> None:
    message = cause.message or TABLE[cause.failure_class].summary
    when = after(draft.seen.now, draft.backoff(nth))
    draft.record_failure(cause.failure_class, cause.message, cause.field)
    draft.set(next_attempt_time=when)
    told = f"{message.rstrip('.')}. Retried automatically: yes, at {when}; {cost}."
    draft.mark(ConditionType.QUEUED, TRUE, cause.failure_class, told)
    draft.be(State.RETRYING, f"another attempt follows: {message}")


def _end(draft: Draft, cause: Cause) -> None:
    draft.fail(State.FAILED, cause.failure_class, cause.message, cause.field)
    draft.set(completion_time=draft.now, next_attempt_time=None)
