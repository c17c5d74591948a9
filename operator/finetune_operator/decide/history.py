"""What stays in status of an attempt that is over: its record, how often attempts ended like it, where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.documents import Spent, TerminationMessage
from finetune_api.failures import TABLE
from finetune_api.status import AttemptRecord, ConditionType, Current, Progress, TimeSpent
from finetune_operator.clock import parse_time
from finetune_operator.decide import goodput
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.documents import SUCCEEDED, read_termination
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.guarding import ROLLED_BACK
from finetune_operator.snapshot import PodView

KEPT_ATTEMPTS = 5


@dataclass(frozen=True)
class Known:
    """How far an attempt came: by its first pod's last words, or else by its progress."""

    step: int | None = None
    resumed_from_step: int | None = None
    checkpoint_step: int | None = None
    tokens_per_second: float | None = None
    spent: Spent | None = None


def known_of(draft: Draft, current: Current) -> Known:
    """Everything that is known of the attempt."""
    said, polled = _last_words(draft.seen.pods_of(current.job_uid)), _progress(draft, current)
    # What was polled before may have been undone by a guard since. The last words leave out what is not so any more.
    newest = said if said is not None else polled
    return Known(
        step=newest.step if newest else None,
        resumed_from_step=newest.resumed_from_step if newest else None,
        checkpoint_step=newest.checkpoint_step if newest else None,
        tokens_per_second=polled.tokens_per_second if polled else None,
        spent=_spent(said, polled),
    )


def record(draft: Draft, current: Current, outcome: str, known: Known, *, avoid_node: str | None = None) -> None:
    """Status keeps the attempt and has none under way any more."""
    status, plan = draft.seen.status, draft.status.plan
    entry = AttemptRecord(
        number=current.number,
        pool=plan.pool if plan is not None else "",
        start_time=current.start_time,
        end_time=draft.now,
        outcome=outcome,
        resumed_from_step=known.resumed_from_step,
        step=known.step,
        checkpoint_step=known.checkpoint_step,
        tokens_per_second=known.tokens_per_second,
        avoid_node=avoid_node,
    )
    draft.set(
        attempts=[*status.attempts, entry][-KEPT_ATTEMPTS:],
        current=None,
        endings={**status.endings, outcome: status.endings.get(outcome, 0) + 1},
        goodput=goodput.with_attempt(status.goodput, _times(draft, current, outcome, known)),
    )
    if status.start_time is None and not waited_for_room(outcome):
        draft.set(start_time=current.running_time or current.start_time)
    if known.checkpoint_step is not None:
        draft.mark(ConditionType.CHECKPOINTED, TRUE, "Committed", f"at step {known.checkpoint_step}")
    elif outcome == ROLLED_BACK:
        draft.mark(ConditionType.CHECKPOINTED, FALSE, outcome, "the run goes on from its beginning")


def account_for_rest(draft: Draft) -> None:
    """Counts the time since the last attempt in, without suspension; for the end of a rest or of the job."""
    status = draft.seen.status
    resting = status.condition(ConditionType.SUSPENDED)
    since = parse_time(resting.last_transition_time) if resting is not None and resting.status == TRUE else None
    draft.set(goodput=goodput.with_gap(draft.status.goodput, parse_time(draft.now), since))


def waited_for_room(outcome: str) -> bool:
    """Whether an attempt with this outcome found no place to run."""
    return outcome in TABLE and TABLE[outcome].waits_for_room


def tries_without_room(attempts: Sequence[AttemptRecord]) -> int:
    """How many attempts in a row found no room, the next one included if it finds none either."""
    count = 1
    for entry in reversed(attempts):
        if not waited_for_room(entry.outcome):
            break
        count += 1
    return count


def nodes_to_avoid(attempts: Sequence[AttemptRecord]) -> tuple[str, ...]:
    """Nodes that were lost or unusable. All get another chance once an attempt has found no room without them."""
    found: list[str] = []
    for entry in reversed(attempts):
        if waited_for_room(entry.outcome):
            break
        if entry.avoid_node is not None and entry.avoid_node not in found:
            found.insert(0, entry.avoid_node)
    return tuple(found)


def saved_step(attempts: Sequence[AttemptRecord]) -> int | None:
    """The step that the last attempt of which it is known left behind as a checkpoint; -1 if it left none.

    Not the highest of all: a guard may have gone back behind it. None where it is known of no attempt.
    """
    for entry in reversed(attempts):
        steps = [step for step in (entry.checkpoint_step, entry.resumed_from_step) if step is not None]
        # Steps of an attempt that went on from nothing and saved nothing, or a guard went back to the beginning.
        if steps or entry.step or entry.outcome == ROLLED_BACK:
            return max(steps, default=-1)
    return None


def _times(draft: Draft, current: Current, outcome: str, known: Known) -> goodput.AttemptTime:
    first = next((pod for pod in draft.seen.pods_of(current.job_uid) if pod.index == 0), None)
    running = parse_time(current.running_time) if current.running_time else None
    return goodput.AttemptTime(
        recorded=parse_time(current.start_time),
        scheduled=parse_time(current.scheduled_time) if current.scheduled_time else None,
        began=(first.started if first is not None else None) or running,
        ended=first.exit_time if first is not None else None,
        closed=parse_time(draft.now),
        spent=known.spent,
        step=known.step,
        resumed_from_step=known.resumed_from_step,
        checkpoint_step=known.checkpoint_step,
        cut_off=outcome != SUCCEEDED and not (outcome in TABLE and TABLE[outcome].keeps_artifact),
        saved_before=saved_step(draft.seen.status.attempts),
    )


def _progress(draft: Draft, current: Current) -> Progress | None:
    progress = draft.seen.status.progress
    return progress if progress is not None and progress.attempt == current.number else None


def _last_words(pods: Sequence[PodView]) -> TerminationMessage | None:
    """Those of the first node, which alone knows of checkpoints."""
    said = (read_termination(pod.termination_message) for pod in pods if pod.index == 0)
    return next((message for message in said if message is not None), None)


def _spent(said: TerminationMessage | None, polled: Progress | None) -> Spent | None:
    """The time as the first node measured it."""
    if said is not None and said.spent is not None:
        return said.spent
    return _from_status(polled.spent) if polled is not None and polled.spent is not None else None


def _from_status(spent: TimeSpent) -> Spent:
    return Spent(**{name: max(0, getattr(spent, f"{name}_seconds")) for name in Spent.model_fields})
