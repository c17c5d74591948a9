"""The end of an attempt: its outcome, what it counts as, and what follows.

Interruptions never count as failures, but five in a row without a new checkpoint end the job. An attempt that found no
room uses up no retry. Every other retriable failure does.
"""

from __future__ import annotations

from finetune_api.failures import MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT, TABLE, Fault
from finetune_api.job import TuningType
from finetune_api.status import Artifacts, AttemptRecord, ConditionType, Current, State
from finetune_operator.clock import after
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.documents import read_termination
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.evidence import cause_of_failure, checkpoint_in
from finetune_operator.snapshot import ChildJob

KEPT_ATTEMPTS = 5
SUCCEEDED = "Succeeded"
# Stops that somebody asked for: what follows them is decided from the spec once the attempt is closed.
SUSPENDED = "Suspended"
CANCELLED = "Cancelled"
DEADLINE = "DeadlineExceeded"
ASKED_FOR = (SUSPENDED, CANCELLED, DEADLINE)
KEEPS_ARTIFACT = "RequirementNotMet"  # the run was finished and its artifact published
NO_ROOM = ("Unschedulable", "QuotaExceeded", "NameTaken")  # waiting for room is no failure of the run


def finished(draft: Draft, current: Current, child: ChildJob) -> None:
    """The Job is Complete or Failed."""
    if child.finished == "Complete":
        _succeed(draft, current, child)
    elif current.stop_reason is not None:
        close(draft, current, stop_cause(draft, current))
    else:
        close(draft, current, cause_of_failure(child, draft.seen.pods_of(child.uid)))


def close(draft: Draft, current: Current, cause: Cause) -> None:
    """The attempt is over and will be followed by another one, by a rest, or by the end of the job."""
    checkpoint = _checkpoint(draft, current)
    is_new = checkpoint is not None and checkpoint > _newest_before(draft)
    _record(draft, current, cause.failure_class, checkpoint)
    draft.mark(ConditionType.TRAINING, FALSE, cause.failure_class, cause.message)
    draft.mark(ConditionType.SCHEDULED, FALSE, cause.failure_class)
    if cause.failure_class in ASKED_FOR:
        draft.be(State.SUSPENDING, "the attempt has stopped")
    elif TABLE[cause.failure_class].fault == Fault.INTERRUPTION:
        _interrupted(draft, cause, new_checkpoint=is_new)
    elif cause.failure_class in NO_ROOM:
        _again(draft, cause, nth=_tries_without_room(draft))
    else:
        if cause.failure_class == KEEPS_ARTIFACT:
            draft.set(artifacts=_artifacts(draft, current.job_uid))
        _failed(draft, cause)


def stop_cause(draft: Draft, current: Current) -> Cause:
    """Why the attempt was stopped, with what was told when the stop began."""
    reason, failure = str(current.stop_reason), draft.seen.status.failure
    if reason not in ASKED_FOR and failure is not None and failure.failure_class == reason:
        return Cause(reason, failure.message, failure.field)
    return Cause(reason, "")


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
    checkpoint = _checkpoint(draft, current)
    _record(draft, current, SUCCEEDED, checkpoint)
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


def _interrupted(draft: Draft, cause: Cause, *, new_checkpoint: bool) -> None:
    status = draft.seen.status
    in_a_row = 1 if new_checkpoint else (status.interruptions_without_checkpoint or 0) + 1
    draft.set(interruptions=(status.interruptions or 0) + 1, interruptions_without_checkpoint=in_a_row)
    if in_a_row >= MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT:
        message = f"{in_a_row} interruptions in a row without a new checkpoint; the last: {cause.message}"
        _end(draft, Cause("NoProgress", message))
    else:
        _again(draft, cause, nth=in_a_row)


def _failed(draft: Draft, cause: Cause) -> None:
    failures = (draft.seen.status.failures or 0) + 1
    draft.set(failures=failures)
    if not TABLE[cause.failure_class].retriable:
        _end(draft, cause)
    elif failures > draft.max_failures:
        _end(draft, Cause(cause.failure_class, f"failed {failures} times; the last: {cause.message}", cause.field))
    else:
        _again(draft, cause, nth=failures)


def _again(draft: Draft, cause: Cause, *, nth: int) -> None:
    draft.record_failure(cause.failure_class, cause.message, cause.field)
    draft.set(next_attempt_time=after(draft.seen.now, draft.backoff(nth)))
    draft.mark(ConditionType.QUEUED, TRUE, cause.failure_class, cause.message)
    draft.be(State.RETRYING, f"another attempt follows: {cause.message or TABLE[cause.failure_class].summary}")


def _end(draft: Draft, cause: Cause) -> None:
    draft.fail(State.FAILED, cause.failure_class, cause.message, cause.field)
    draft.set(completion_time=draft.now, next_attempt_time=None)


def _record(draft: Draft, current: Current, outcome: str, checkpoint: int | None) -> None:
    plan = draft.status.plan
    record = AttemptRecord(
        number=current.number,
        pool=plan.pool if plan is not None else "",
        start_time=current.start_time,
        end_time=draft.now,
        outcome=outcome,
        checkpoint_step=checkpoint,
        lost_node=current.lost_node,
    )
    draft.set(attempts=[*draft.seen.status.attempts, record][-KEPT_ATTEMPTS:], current=None)
    if draft.seen.status.start_time is None and outcome not in NO_ROOM:
        draft.set(start_time=current.running_time or current.start_time)
    if checkpoint is not None:
        draft.mark(ConditionType.CHECKPOINTED, TRUE, "Committed", f"at step {checkpoint}")


def _checkpoint(draft: Draft, current: Current) -> int | None:
    """The attempt's newest checkpoint, by its pods' last words or else by its progress."""
    said = checkpoint_in(draft.seen.pods_of(current.job_uid))
    progress = draft.seen.status.progress
    polled = progress.checkpoint_step if progress is not None and progress.attempt == current.number else None
    return max((step for step in (said, polled) if step is not None), default=None)


def _newest_before(draft: Draft) -> int:
    return max((r.checkpoint_step for r in draft.seen.status.attempts if r.checkpoint_step is not None), default=-1)


def _tries_without_room(draft: Draft) -> int:
    count = 1
    for record in reversed(draft.seen.status.attempts):
        if record.outcome not in NO_ROOM:
            break
        count += 1
    return count
