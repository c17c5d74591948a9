"""When to ask whom: an interval per pod that stretches so that all pods together stay under the global limit. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressSettings:
    """interval_seconds: shortest time between two questions to one pod; writes_per_second: to all pods together.

    A question leads to at most one write, so both bound questions and writes.
    """

    interval_seconds: float = 10.0
    writes_per_second: float = 20.0


class Schedule:
    """Due times by pod UID. A pod that is being asked is not due again until `done`."""

    def __init__(self, settings: ProgressSettings) -> None:
        self._settings = settings
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._busy: dict[str, float | None] = {}  # asked now -> a wish that came meanwhile

    @property
    def interval(self) -> float:
        """Seconds between two questions to one pod, with as many pods as there are now."""
        pods = len(self._due) + len(self._busy)
        return max(self._settings.interval_seconds, pods / self._settings.writes_per_second)

    def want(self, key: str, at: float) -> None:
        """Ask at that time or earlier."""
        if key in self._busy:
            earlier = self._busy[key]
            self._busy[key] = at if earlier is None else min(at, earlier)
        elif at < self._due.get(key, float("inf")):
            self._due[key] = at
            heapq.heappush(self._heap, (at, key))

    def drop(self, key: str) -> None:
        """Never ask again."""
        self._due.pop(key, None)
        self._busy.pop(key, None)

    def next(self, now: float) -> str | None:
        """A pod that is due, marked as being asked; the longest overdue first."""
        self._discard_outdated()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._busy[key] = None
        return key

    def wait(self, now: float) -> float | None:
        """Seconds until a pod is due; None where there is none."""
        self._discard_outdated()
        return max(0.0, self._heap[0][0] - now) if self._heap else None

    def done(self, key: str, started: float) -> None:
        """The pod was asked; the next question follows one interval after the start of this one."""
        if key not in self._busy:
            return
        wish = self._busy.pop(key)
        regular = started + self.interval
        self.want(key, regular if wish is None else min(wish, regular))

    def _discard_outdated(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
