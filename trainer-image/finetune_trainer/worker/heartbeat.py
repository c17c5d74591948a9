"""Signs of life: a file whose modification time the agent watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A phase that is longer than this counts as a hang even while the process lives.
LONG_PHASE_SECONDS = 1800.0
_INTERVAL_SECONDS = 1.0


class Heartbeat:
    """Touches one file, at most once a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.beat()

    def beat(self) -> None:
        """Say that work went on."""
        now = time.monotonic()
        if now - self._last >= _INTERVAL_SECONDS:
            self._last = now
            self._path.touch()

    @contextmanager
    def long_phase(self, limit_seconds: float = LONG_PHASE_SECONDS) -> Iterator[None]:
        """Beat from a thread while one library call takes its time, for at most limit_seconds."""
        done = threading.Event()
        deadline = time.monotonic() + limit_seconds

        def keep_beating() -> None:
            while not done.wait(_INTERVAL_SECONDS) and time.monotonic() < deadline:
                self._path.touch()

        thread = threading.Thread(target=keep_beating, name="long-phase", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.beat()
