"""The summariser: from what the steps recorded to the conditions, and from changed conditions to events.

Steps record marks and one state; nothing else writes a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_api.failures import TABLE
from finetune_api.status import Condition, ConditionStatus, ConditionType, Failure, State
from finetune_operator.actions import Event

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
IN_PROGRESS = "InProgress"
PENDING = "Pending"
LONGEST_MESSAGE = 2000
LONGEST_EVENT = 1000
LONGEST_CAUSE = 500  # of an end's message, so that what follows it is not cut off in an event
WAITED_FOR = ("ReferenceNotFound", "AdmissionDenied")
"""The preflight pod waits for what is missing, and starts by itself once it is there."""
FAILED_STATES = (State.FAILED, State.INVALID, State.CANCELLED)
END_STATES = (*FAILED_STATES, State.SUCCEEDED)

# Conditions whose being True is news for people.
_NEWS = (
    ConditionType.VALIDATED,
    ConditionType.PLANNED,
    ConditionType.SCHEDULED,
    ConditionType.TRAINING,
    ConditionType.SUCCEEDED,
    ConditionType.FAILED,
    ConditionType.SUSPENDED,
)


@dataclass(frozen=True)
class Mark:
    """What a step says about one condition."""

    status: ConditionStatus
    reason: str
    message: str = ""


def summarise(
    before: Sequence[Condition],
    marks: Mapping[ConditionType, Mark],
    state: State,
    reason: str,
    message: str,
    *,
    failure: Failure | None,
    generation: int,
    now: str,
) -> list[Condition]:
    """All conditions in their order. One that nobody marked stays as it was; one never seen is Unknown.

    A transition time moves only when the status does.
    """
    old = {condition.type: condition for condition in before}
    every = {**marks, **_from_state(state, reason, message, failure)}
    found: list[Condition] = []
    for kind in ConditionType:
        previous = old.get(kind)
        mark = every.get(kind) or _kept(previous)
        same = previous is not None and previous.status == mark.status
        found.append(
            Condition(
                type=kind,
                status=mark.status,
                reason=mark.reason,
                message=mark.message[:LONGEST_MESSAGE],
                observed_generation=generation,
                last_transition_time=previous.last_transition_time if previous is not None and same else now,
            )
        )
    return found


def first_sight(generation: int, now: str) -> list[Condition]:
    """All conditions as Unknown, but Reconciling: a fresh object must not look settled to kstatus."""
    return [
        Condition(
            type=kind,
            status=TRUE if kind == ConditionType.RECONCILING else UNKNOWN,
            reason=PENDING,
            observed_generation=generation,
            last_transition_time=now,
        )
        for kind in ConditionType
    ]


def transitions(before: Sequence[Condition], after: Sequence[Condition]) -> tuple[Event, ...]:
    """One event per reason that is new: a condition became true, or tells of a failure that it did not tell before.

    Failed is heard first: where a job has ended, it tells most.
    """
    old = {condition.type: (condition.status, condition.reason) for condition in before}
    told: dict[str, Event] = {}
    for condition in sorted(after, key=lambda condition: condition.type != ConditionType.FAILED):
        if old.get(condition.type) == (condition.status, condition.reason):
            continue
        failed = condition.reason in TABLE
        became_true = condition.status == TRUE and condition.type in _NEWS
        if condition.reason not in told and (failed or became_true):
            text = condition.message or f"{condition.type} is {condition.status}"
            told[condition.reason] = Event("Warning" if failed else "Normal", condition.reason, text[:LONGEST_EVENT])
    return tuple(told.values())


def _kept(previous: Condition | None) -> Mark:
    if previous is None:
        return Mark(UNKNOWN, PENDING)
    return Mark(previous.status, previous.reason, previous.message)


def explain(failure: Failure, *, can_be_mended: bool) -> str:
    """All that the owner of a job at its end has to know: what happened, which field, what to do, where to read on."""
    message = failure.message
    if len(message) > LONGEST_CAUSE:
        message = f"{message[:LONGEST_CAUSE]}… (status.failure.message has all of it)"
    parts = [
        message.rstrip("."),
        f"Field: {failure.field}" if failure.field else "",
        f"What to do: {failure.hint.rstrip('.')}",
        f"Retried automatically: {_what_follows(failure) if can_be_mended else 'no'}",
        f"Runbook: {failure.runbook}",
    ]
    return ". ".join(part for part in parts if part)


def _what_follows(failure: Failure) -> str:
    """What starts an Invalid job's preflight again."""
    if failure.failure_class in WAITED_FOR:
        return "no, it goes on once that is done"
    return "no. Once it is mended, edit the spec, or set spec.suspend to true and back to false, to check again"


def _from_state(state: State, reason: str, message: str, failure: Failure | None) -> dict[ConditionType, Mark]:
    failed = state in FAILED_STATES
    ended = state in END_STATES
    cause = reason if ended else IN_PROGRESS
    told = message if ended else ""
    explained = explain(failure, can_be_mended=state == State.INVALID) if failed and failure is not None else told
    found = {
        ConditionType.SUCCEEDED: Mark(TRUE if state == State.SUCCEEDED else FALSE, cause, told),
        ConditionType.FAILED: Mark(TRUE if failed else FALSE, cause, explained),
        ConditionType.FINISHED: Mark(TRUE if ended else FALSE, cause, told),
        ConditionType.SUSPENDED: Mark(TRUE if state == State.SUSPENDED else FALSE, *_suspension(state, message)),
        ConditionType.RECONCILING: Mark(
            FALSE if ended or state == State.SUSPENDED else TRUE, cause if ended else state.value, ""
        ),
        # A cancelled job rests where its owner wanted it; every other failure waits for somebody.
        ConditionType.STALLED: Mark(
            TRUE if failed and state != State.CANCELLED else FALSE, cause, explained if failed else ""
        ),
    }
    if ended:
        for kind in (ConditionType.QUEUED, ConditionType.SCHEDULED, ConditionType.TRAINING):
            found[kind] = Mark(FALSE, cause, told)
    return found


def _suspension(state: State, message: str) -> tuple[str, str]:
    if state in (State.SUSPENDED, State.SUSPENDING):
        return state.value, message
    return "NotSuspended", ""
