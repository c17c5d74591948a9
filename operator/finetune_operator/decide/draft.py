"""The decision in the making: steps record what they find, `decision` turns it into one status."""

from __future__ import annotations

from typing import Any

from finetune_api.failures import DEFAULT_MAX_FAILURES, TABLE
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import with_resolved
from finetune_api.status import ConditionStatus, ConditionType, Failure, FineTuneJobStatus, State
from finetune_operator.actions import Action, Decision, Event
from finetune_operator.clock import format_time
from finetune_operator.config import Config
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import LONGEST_MESSAGE, PENDING, UNKNOWN, Mark, summarise, transitions
from finetune_operator.snapshot import Snapshot


class Draft:
    """Collects the changes of one decision. Nothing outside it changes."""

    def __init__(self, seen: Snapshot, config: Config) -> None:
        self.seen = seen
        self.config = config
        self._changes: dict[str, Any] = {}
        self._marks: dict[ConditionType, Mark] = {}
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._look_again: float | None = None
        self._state = seen.status.state or State.PENDING
        self._message = seen.status.message or ""
        self._reason: str | None = None

    @property
    def now(self) -> str:
        """The snapshot's time as the API writes it."""
        return format_time(self.seen.now)

    @property
    def spec(self) -> FineTuneJobSpec:
        """The spec, where it is known to be readable, with what its fromJob fields stand for."""
        assert self.seen.job.spec is not None, "an unreadable spec is refused before any step that needs it"
        return with_resolved(self.seen.job.spec, self.status.resolved)

    @property
    def status(self) -> FineTuneJobStatus:
        """The status with the changes so far, the conditions still as they were."""
        return self.seen.status.model_copy(update=self._changes)

    def obstacle(self, name: str) -> Cause | None:
        """Why the API server would not create the child of that name, if this reconcile has just tried."""
        for item in self.seen.obstacles:
            if item.name == name:
                return Cause(item.failure_class, item.message)
        return None

    def set(self, **changes: Any) -> None:
        """Changes fields of the status."""
        self._changes.update(changes)

    def do(self, *actions: Action) -> None:
        """Asks for actions, in order."""
        self._actions += actions

    def tell(self, event: Event) -> None:
        """Tells of something that is no condition. It has to change the status too: else it is told again."""
        self._events.append(event)

    def look(self, seconds: float) -> None:
        """Asks to look again after at most that many seconds."""
        seconds = max(0.5, seconds)
        self._look_again = seconds if self._look_again is None else min(self._look_again, seconds)

    def mark(self, kind: ConditionType, status: ConditionStatus, reason: str, message: str = "") -> None:
        """Says what one condition is."""
        self._marks[kind] = Mark(status, reason, message)

    def be(self, state: State, message: str, *, reason: str | None = None) -> None:
        """Says in which state the job is; `reason` is needed where the state is an end."""
        self._state, self._message, self._reason = state, message[:LONGEST_MESSAGE], reason

    def fail(self, state: State, failure_class: str, message: str, field: str | None = None) -> None:
        """The job is at its end with this row of the failure table."""
        self.record_failure(failure_class, message, field)
        self.be(state, message or TABLE[failure_class].summary, reason=failure_class)

    def record_failure(self, failure_class: str, message: str, field: str | None = None) -> None:
        """status.failure tells this from now on."""
        row = TABLE[failure_class]
        self.set(
            failure=Failure(
                failure_class=row.name,
                message=(message or row.summary)[:LONGEST_MESSAGE],
                field=field,
                hint=row.hint,
                retriable=row.retriable,
                runbook=row.runbook,
            )
        )

    def start_over(self) -> None:
        """Forgets what an earlier generation of an unplanned job led to."""
        self.set(resolved=[], preflight=None, failure=None, failures=None, next_attempt_time=None)
        self.set(preflight_failures={}, interruptions_without_checkpoint=None)
        for kind in (ConditionType.VALIDATED, ConditionType.PLANNED):
            self.mark(kind, UNKNOWN, PENDING)
        self.be(State.PENDING, "looking at the job")

    @property
    def max_failures(self) -> int:
        """How many failed attempts are repeated."""
        given = self.seen.job.spec.retry if self.seen.job.spec else None
        chosen = given.max_failures if given else None
        return DEFAULT_MAX_FAILURES if chosen is None else chosen

    def backoff(self, nth: int) -> float:
        """Seconds before the try after the nth one in a row that came to nothing."""
        doubled = self.config.retry_base_seconds * 2.0 ** min(nth - 1, 30)
        return min(doubled, self.config.retry_max_seconds)

    def decision(self) -> Decision:
        """What has been decided."""
        before = self.seen.status
        conditions = summarise(
            before.conditions,
            self._marks,
            self._state,
            self._end_reason(),
            self._message,
            failure=self.status.failure,
            generation=self.seen.job.generation,
            now=self.now,
        )
        self.set(
            observed_generation=self.seen.job.generation,
            conditions=conditions,
            state=self._state,
            message=self._message,
        )
        return Decision(
            status=self.status,
            actions=tuple(self._actions),
            events=(*transitions(before.conditions, conditions), *self._events),
            look_again=self._look_again,
        )

    def _end_reason(self) -> str:
        if self._reason is not None:
            return self._reason
        finished = self.seen.status.condition(ConditionType.FINISHED)
        return finished.reason if finished is not None else PENDING
