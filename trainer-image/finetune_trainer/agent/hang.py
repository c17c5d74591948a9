"""When silence counts as a hang, and which rank it began with. Pure: the caller brings the time."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.agent.timekeeping import Activity

_MEDIAN_FACTOR = 5.0
_REMEMBERED_STEPS = 51


@dataclass(frozen=True)
class HangLimits:
    """Seconds of silence: least once steps are made (or 5 × the median step), start where steps are not expected."""

    least: float
    start: float


class HangWatch:
    """Tells a hang from slow work by the heartbeats of all ranks.

    A heartbeat is any value that changes, such as a modification time: only the change counts, so a clock that is
    set does no harm. All ranks are silent when none changed: one that hangs holds up the others at the next step.
    """

    def __init__(self, limits: HangLimits, now: float) -> None:
        self._limits = limits
        self._marks: tuple[object, ...] = ()
        self._last_sign = now
        self._step: int | None = None
        self._step_time = now
        self._step_seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._stepping = False

    def see(self, now: float, marks: tuple[object, ...], step: int | None, *, stepping: bool) -> None:
        """Take in the heartbeats and rank 0's step, None before it is known; stepping: steps are due now."""
        self._stepping = stepping
        if marks != self._marks:
            self._marks, self._last_sign = marks, now
        if step is None or step == self._step:
            return
        if self._step is not None and step > self._step:
            self._step_seconds.append((now - self._step_time) / (step - self._step))
        self._step, self._step_time, self._last_sign = step, now, now

    @property
    def limit(self) -> float:
        """Seconds of silence that are too long right now."""
        if not self._stepping or not self._step_seconds:
            return self._limits.start
        return max(self._limits.least, _MEDIAN_FACTOR * statistics.median(self._step_seconds))

    def silence(self, now: float) -> float:
        """Seconds since the last sign of life."""
        return now - self._last_sign

    def is_hung(self, now: float) -> bool:
        """Whether the silence is too long."""
        return self.silence(now) > self.limit


@dataclass(frozen=True)
class Sign:
    """The last sign of life of one rank. time: rises from one to the next. activity: what it did; None: not known."""

    rank: int
    time: int
    activity: Activity | None


def tell_silence(signs: Sequence[Sign], *, whole_gang: bool) -> str:
    """Which rank fell silent first and what each one did, in sentences.

    A rank that waits for the others in a collective operation is held up: the cause is elsewhere. whole_gang: signs are
    those of all ranks, not of one node's only.
    """
    waiting = [sign for sign in signs if sign.activity is Activity.WAITING]
    own = sorted((sign for sign in signs if sign.activity is not Activity.WAITING), key=lambda sign: sign.time)
    if not own:
        where = "" if whole_gang else " The cause is on another node: look at the logs of the other pods."
        return f"{_names(signs)} fell silent {_while(signs[0])}.{where}"
    if not waiting and len(own) > 1 and len({sign.activity for sign in own}) == 1:
        return f"{_names(own)} fell silent {_while(own[0])}: all at the same place, as in a collective operation."
    if len(signs) == 1:
        return f"Rank {own[0].rank} fell silent {_while(own[0])}".rstrip() + "."
    first = f"Rank {own[0].rank} fell silent first, {_while(own[0])}".rstrip(", ")
    others = [f"rank {sign.rank} {_while(sign)}".strip() for sign in own[1:]]
    held = [f"{_names(waiting).lower()} held up {_while(waiting[0])}"] if waiting else []
    return "; ".join([first, *others, *held]) + "."


def _while(sign: Sign) -> str:
    return f"while {sign.activity.value}" if sign.activity is not None else ""


def _names(signs: Sequence[Sign]) -> str:
    ranks = ", ".join(str(rank) for rank in sorted(sign.rank for sign in signs))
    return f"Rank {ranks}" if len(signs) == 1 else f"Ranks {ranks}"
