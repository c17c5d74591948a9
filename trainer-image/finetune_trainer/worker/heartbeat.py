"""Signs of life: a file whose modification time the agent watches, and which says what this rank does."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.agent.timekeeping import Activity, Times
from finetune_trainer.agent.workdir import write_whole

# What takes longer than this without a sign of its own counts as a hang even while the process lives.
LONG_PHASE_SECONDS = 1800.0
_INTERVAL_SECONDS = 1.0
_WIDTH = max(len(activity) for activity in Activity)


class Heartbeat:
    """Touches one file at most once a second, and at once where this rank begins something else."""

    def __init__(self, path: Path, times: Path | None = None) -> None:
        """times: where the clock of phases is left; None: this rank keeps none (every rank but the node's first)."""
        self._path = path
        self._times_path = times
        self._times = Times(since=time.monotonic())
        self._last = 0.0
        self.activity = Activity.LOADING
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT)
        self.doing(Activity.LOADING)
        self._write_times()

    def beat(self) -> None:
        """Say that work went on."""
        now = time.monotonic()
        if now - self._last >= _INTERVAL_SECONDS:
            self._last = now
            self._path.touch()

    def doing(self, activity: Activity) -> None:
        """Say what this rank does from now on: a write of a few bytes, so it may be said several times a step."""
        self.activity = activity
        self._last = time.monotonic()
        os.pwrite(self._file, activity.ljust(_WIDTH).encode(), 0)
        if activity.phase is not self._times.phase:
            self._times = self._times.enter(activity.phase, self._last)
            self._write_times()

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Inside, this rank does activity; afterwards what it did before."""
        before = self.activity
        self.doing(activity)
        try:
            yield
        finally:
            self.doing(before)

    @contextmanager
    def long_phase(self, limit_seconds: float = LONG_PHASE_SECONDS) -> Iterator[None]:
        """Beat from a thread while library calls take their time, each for at most limit_seconds after the last sign."""
        done = threading.Event()
        self._last = time.monotonic()

        def keep_beating() -> None:
            while not done.wait(_INTERVAL_SECONDS):
                if time.monotonic() < self._last + limit_seconds:
                    self._path.touch()

        thread = threading.Thread(target=keep_beating, name="long-phase", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.beat()

    def _write_times(self) -> None:
        if self._times_path is not None:
            write_whole(self._times_path, json.dumps(self._times.to_json()))
