"""Where the time of an attempt goes: each moment in one field of `Spent`.

The agent's clock runs from the start of its process to its end. While workers run, the node's first rank keeps a clock of its
own and leaves it in a file at each change; both count on the machine's one monotonic clock, so the two fit together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError

from finetune_api.base import Document
from finetune_api.documents import Spent
from finetune_trainer.agent.workdir import WorkDir, read_json


class Phase(StrEnum):
    """The fields of `Spent` that time goes to as it passes; `redo` gets its seconds from `train` later."""

    START = "start"
    RESTORE = "restore"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save"


class Activity(StrEnum):
    """What one worker does, in words that follow "while"."""

    LOADING = "loading"
    RESTORING = "taking up the checkpoint"
    READING_DATA = "reading data"
    WAITING = "waiting for the other ranks"
    STEPPING = "computing a step"
    SAVING = "saving a checkpoint"
    EVALUATING = "evaluating"
    PUBLISHING = "writing the artifact"

    @property
    def phase(self) -> Phase:
        """Where its time goes."""
        return _PHASES.get(self, Phase.TRAIN)


_PHASES = {
    Activity.LOADING: Phase.START,
    Activity.RESTORING: Phase.RESTORE,
    Activity.SAVING: Phase.SAVE,
    Activity.EVALUATING: Phase.EVALUATE,
    Activity.PUBLISHING: Phase.SAVE,
}


class Times(Document):
    """A clock of phases: what was spent up to `since`, a monotonic time, and the phase that runs from then on."""

    spent: Spent = Spent()
    phase: Phase = Phase.START
    since: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @property
    def begun(self) -> float:
        """When this clock was at zero."""
        return self.since - self.spent.total

    def at(self, now: float) -> Spent:
        """What is spent up to now; its total is now - begun."""
        return moved(self.spent, self.phase, max(0.0, now - self.since))

    def enter(self, phase: Phase, now: float) -> Self:
        """The clock with phase running from now on."""
        return self.model_copy(update={"spent": self.at(now), "phase": phase, "since": max(now, self.since)})

    def followed_by(self, other: Times) -> Times:
        """This clock up to the moment at which other began, and other from then on."""
        before, after = self.at(other.begun), other.spent
        both = Spent(**{name: getattr(before, name) + getattr(after, name) for name in Spent.model_fields})
        return other.model_copy(update={"spent": both})


def moved(spent: Spent, to: str, seconds: float) -> Spent:
    """spent with so many seconds more in the field `to`."""
    return spent.model_copy(update={to: getattr(spent, to) + seconds})


class Timekeeper:
    """The clock of one attempt on this node. One thread enters phases; any thread may read."""

    def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """begun: the monotonic time that counts as the attempt's start; None: that of this process."""
        self._clock = clock
        self._own = Times(since=process_start() if begun is None else begun)
        self._of_workers: Times | None = None
        self._first_step = 0
        self._kept: list[tuple[int, int, float]] = []

    @property
    def spent(self) -> Spent:
        """Everything up to now."""
        return self._joined().at(self._clock())

    def enter(self, phase: Phase) -> None:
        """The agent itself does something else from now on; the workers' clock has ended."""
        # In this order: a reader in between finds the workers' clock older than the agent's, which does not count.
        self._own = self._joined().enter(phase, self._clock())
        self._of_workers = None

    def hear(self, work: WorkDir) -> None:
        """Take in the workers' clock, if there is a valid one."""
        found = read_json(work.times)
        if found is not None:
            try:
                self._of_workers = Times.from_json(found)
            except ValidationError:
                return

    def resumed_from(self, step: int) -> None:
        """The steps from this one on are made by this attempt."""
        self._first_step = step

    def roll_back(self, step: int, to_step: int) -> None:
        """The training seconds of the steps after to_step, up to step, count as redo: they were made in vain.

        The workers have ended. Steps between two starts of the workers count as equally long.
        """
        joined = self._joined().enter(Phase.START, self._clock())
        spent = joined.spent
        known = sum(seconds for _, _, seconds in self._kept)
        stretches = [*self._kept, (self._first_step, step, spent.train - known)]
        self._kept = [(first, min(last, to_step), _share(first, last, s, to_step)) for first, last, s in stretches]
        lost = spent.train - sum(seconds for _, _, seconds in self._kept)
        self._first_step = to_step
        self._own = joined.model_copy(update={"spent": moved(moved(spent, "redo", lost), Phase.TRAIN, -lost)})
        self._of_workers = None

    def _joined(self) -> Times:
        theirs = self._of_workers
        # A clock that began before the agent's present phase is that of workers which have ended.
        return self._own if theirs is None or theirs.begun < self._own.since else self._own.followed_by(theirs)


def _share(first: int, last: int, seconds: float, to_step: int) -> float:
    """The seconds of the steps after first that are not after to_step, of those for first to last."""
    if last <= first:
        return seconds if first <= to_step else 0.0
    return seconds * min(1.0, max(0.0, (to_step - first) / (last - first)))


def process_start() -> float:
    """The monotonic time at which this process was started (Linux; proc_pid_stat(5), field 22)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
