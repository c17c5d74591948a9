"""When silence counts as a hang. Pure: the caller brings the time."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

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
