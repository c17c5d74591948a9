"""Follows a job and tells in a person's words what happens."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from hack.stand import Stand

INTERVAL_SECONDS = 2.0


def follow(stand: Stand, namespace: str, name: str, *, seconds: float, out: TextIO = sys.stdout) -> dict[str, Any]:
    """Print each change until the job is finished; returns the job. Raises TimeoutError after that many seconds."""
    told = _Told(out)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = stand.job(namespace, name)
        status = job.get("status", {})
        told.state(status.get("state"), status.get("message"))
        told.progress(status.get("progress"))
        if any(c["type"] == "Finished" and c["status"] == "True" for c in status.get("conditions", [])):
            told.end()
            return job
        time.sleep(INTERVAL_SECONDS)
    raise TimeoutError(f"{namespace}/{name} did not finish in {seconds:.0f} s")


class _Told:
    """What was said already: nothing is said twice."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.live = out.isatty()
        self.open_line = False
        self.last_state = ""
        self.last_progress = ""
        self.start = time.monotonic()

    def state(self, state: str | None, message: str | None) -> None:
        text = f"{state or 'Pending'}: {message or 'the operator has not looked at it yet'}"
        if text != self.last_state:
            self.last_state = text
            self._line(text)

    def progress(self, progress: dict[str, Any] | None) -> None:
        if not progress:
            return
        parts = [progress["summary"]]
        parts += [f"loss {progress['lossText']}"] if progress.get("lossText") else []
        parts += [f"{progress['eta']} to go"] if progress.get("eta") else []
        text = "  ".join(parts)
        if text == self.last_progress:
            return
        self.last_progress = text
        if self.live:
            self.out.write(f"\r\033[K  {self._clock()}    {text}")
            self.out.flush()
            self.open_line = True
        else:
            self._line(f"  {text}")

    def end(self) -> None:
        if self.open_line:
            self.out.write("\n")
            self.open_line = False

    def _line(self, text: str) -> None:
        self.end()
        self.out.write(f"  {self._clock()}  {text}\n")
        self.out.flush()

    def _clock(self) -> str:
        return f"{time.monotonic() - self.start:5.0f} s"
