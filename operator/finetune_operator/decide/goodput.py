"""Where a job's time went: `status.goodput`, one attempt after the other. Pure arithmetic on times.

What an attempt says of its own time comes from the tenant's pod, so it never counts for more than the time in which its
container ran. Every second between the first attempt's number and the newest end is in exactly one part, but for
suspension, which is in none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from finetune_api.documents import Spent
from finetune_api.status import Goodput
from finetune_operator.clock import format_time, parse_time

PARTS = ("queue", "start", "train", "evaluate", "save", "restore", "redo", "down")


@dataclass(frozen=True)
class AttemptTime:
    """The times of one attempt that is over, and what it says of itself.

    recorded: when its number was written down. scheduled: when all pods had a node. began, ended: when the first node's
    container ran. closed: when the operator counted its end. None: it never happened, or nobody saw it.
    cut_off: whether steps beyond the newest checkpoint have to be made again. saved_before: the step that the attempt
    before left behind as a checkpoint.
    """

    recorded: datetime
    scheduled: datetime | None
    began: datetime | None
    ended: datetime | None
    closed: datetime
    spent: Spent | None = None
    step: int | None = None
    resumed_from_step: int | None = None
    checkpoint_step: int | None = None
    cut_off: bool = True
    saved_before: int | None = None


def with_attempt(so_far: Goodput | None, attempt: AttemptTime) -> Goodput:
    """The account with one more attempt; the time since the last entry is down time."""
    before = with_gap(so_far, attempt.recorded)
    parts = _parts(attempt)
    return _with(before and _without_undone(before, attempt, parts), attempt.recorded, attempt.closed, parts)


def with_gap(so_far: Goodput | None, until: datetime, suspended_since: datetime | None = None) -> Goodput | None:
    """The account up to `until`: down time, and nothing from the moment on when the job was suspended."""
    if so_far is None:
        return None
    start = parse_time(so_far.until_time)
    down = _clamp(suspended_since or until, start, until)
    return _with(so_far, start, max(start, until), {"down": (down - start).total_seconds()}, counted_until=down)


def _parts(attempt: AttemptTime) -> dict[str, float]:
    closed = max(attempt.closed, attempt.recorded)
    scheduled = _clamp(attempt.scheduled or attempt.began or closed, attempt.recorded, closed)
    began = _clamp(attempt.began or closed, scheduled, closed)
    ended = _clamp(attempt.ended or closed, began, closed)
    ran = (ended - began).total_seconds()
    spent = attempt.spent or Spent()
    share = min(1.0, ran / spent.total) if spent.total > 0 else 0.0
    lost = spent.train * _lost_share(attempt)
    parts = {
        "start": spent.start,
        "train": spent.train - lost,
        "evaluate": spent.evaluate,
        "save": spent.save,
        "restore": spent.restore,
        "redo": spent.redo + lost,
    }
    parts = {name: seconds * share for name, seconds in parts.items()}
    parts["down"] = (closed - ended).total_seconds() + ran - sum(parts.values())
    parts["queue"] = (scheduled - attempt.recorded).total_seconds()
    parts["start"] += (began - scheduled).total_seconds()
    return parts


def _lost_share(attempt: AttemptTime) -> float:
    """The share of the attempt's steps that are beyond its newest checkpoint."""
    first = attempt.resumed_from_step or 0
    made = (attempt.step or 0) - first
    if not attempt.cut_off or made <= 0:
        return 0.0
    kept = max(attempt.checkpoint_step or 0, first) - first
    return 1.0 - min(1.0, kept / made)


def _without_undone(before: Goodput, attempt: AttemptTime, parts: dict[str, float]) -> Goodput:
    """The account before an attempt that went on from an earlier step than the newest saved one: these steps are redo.

    How long they took is told by the steps of this attempt.
    """
    first, saved = attempt.resumed_from_step, attempt.saved_before
    made = (attempt.step or 0) - (first or 0)
    if first is None or saved is None or saved <= first or made <= 0:
        return before
    seconds = min(before.train_seconds, int((parts["train"] + parts["redo"]) * (saved - first) / made))
    return before.model_copy(
        update={"train_seconds": before.train_seconds - seconds, "redo_seconds": before.redo_seconds + seconds}
    )


def _with(
    so_far: Goodput | None,
    start: datetime,
    until: datetime,
    parts: dict[str, float],
    counted_until: datetime | None = None,
) -> Goodput:
    """Adds the parts in whole seconds that add up to the time from start to counted_until, rounded once."""
    whole = _whole_seconds(parts, int(((counted_until or until) - start).total_seconds()))
    old = {name: getattr(so_far, f"{name}_seconds") if so_far else 0 for name in PARTS}
    new = {name: old[name] + whole.get(name, 0) for name in PARTS}
    total = sum(new.values())
    return Goodput(
        since_time=so_far.since_time if so_far else format_time(start),
        until_time=format_time(until),
        queue_seconds=new["queue"],
        start_seconds=new["start"],
        train_seconds=new["train"],
        evaluate_seconds=new["evaluate"],
        save_seconds=new["save"],
        restore_seconds=new["restore"],
        redo_seconds=new["redo"],
        down_seconds=new["down"],
        percent=100 * new["train"] // total if total else 0,
    )


def _whole_seconds(parts: dict[str, float], total: int) -> dict[str, int]:
    """The parts as whole numbers with that sum: rounded down, and what is left over goes to the largest remainders."""
    floors = {name: math.floor(max(0.0, seconds)) for name, seconds in parts.items()}
    by_remainder = sorted(parts, key=lambda name: floors[name] - parts[name])
    left = total - sum(floors.values())
    for position in range(left):
        floors[by_remainder[position % len(by_remainder)]] += 1
    return floors


def _clamp(moment: datetime, low: datetime, high: datetime) -> datetime:
    return min(max(moment, low), max(low, high))
