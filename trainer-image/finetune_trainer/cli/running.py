"""Runs the agent as a child process and follows it to its end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from finetune_api import naming
from finetune_api.documents import PROGRESS_BYTES, ProgressDocument, TerminationMessage
from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunFile
from finetune_trainer.cli.progress import Display, open_display

_LOOK_SECONDS = 0.3
_REQUEST_SECONDS = 2.0
_STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Place:
    """The files of a local run below one folder."""

    root: Path

    @property
    def work(self) -> Path:
        """The agent's work directory."""
        return self.root / "work"

    @property
    def run_file(self) -> Path:
        """What the agent is told to run."""
        return self.root / "run.json"

    @property
    def log(self) -> Path:
        """What agent and workers printed."""
        return self.root / "log"

    @property
    def last_words(self) -> Path:
        """The agent's termination message."""
        return self.root / "termination.json"


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """Nobody else runs in this place meanwhile. Raises FinetuneError(OutputInUse) if somebody does."""
    place.root.mkdir(parents=True, exist_ok=True)
    with (place.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FinetuneError(
                f"the same job runs already in {place.root}. Wait for it, or stop it.", failure_class="OutputInUse"
            ) from None
        yield


class AgentProcess:
    """The agent, in a session of its own, so that Ctrl-C reaches only this command."""

    def __init__(
        self, run: RunFile, place: Place, environment: Mapping[str, str], stop_seconds: float, worker_module: str | None
    ) -> None:
        for stale in (place.last_words, place.work / "state" / "port"):
            stale.unlink(missing_ok=True)
        place.run_file.write_text(json.dumps(run.to_json(), indent=1))
        self._place = place
        self._log = place.log.open("ab")
        command = [
            # SIGTERM if this command is killed: the agent then saves and stops.
            sys.executable,
            "-m",
            "finetune_trainer.agent.tether",
            str(os.getpid()),
            str(int(signal.SIGTERM)),
            "finetune_trainer.agent",
            "--run-file",
            str(place.run_file),
            "--work",
            str(place.work),
            "--termination-log",
            str(place.last_words),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--master-port",
            "0",
            "--stop-budget",
            str(stop_seconds),
            "--local",
            "--log-format",
            "text",
            *(["--worker-module", worker_module] if worker_module else []),
        ]
        cluster_only = (naming.ENV_ATTEMPT, naming.ENV_NODE_RANK, naming.ENV_MASTER)
        self._process = subprocess.Popen(
            command,
            env={name: value for name, value in environment.items() if name not in cluster_only},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """The exit code once the agent has ended; None after so many seconds without."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._log.close()
        return code

    def stop(self) -> None:
        """Ask for a clean stop with a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once; its workers end with it."""
        self._process.kill()

    def progress(self) -> ProgressDocument | None:
        """The agent's newest progress; None while it does not answer."""
        try:
            port = int((self._place.work / "state" / "port").read_text())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=_REQUEST_SECONDS) as answer:
                return ProgressDocument.from_json(json.loads(answer.read(PROGRESS_BYTES)))
        except (OSError, ValueError, ValidationError, urllib.error.URLError):
            return None

    def last_words(self) -> TerminationMessage:
        """What the agent said at its end; Internal if it could not say anything."""
        try:
            return TerminationMessage.from_json(json.loads(self._place.last_words.read_bytes()))
        except (OSError, ValueError):
            return TerminationMessage(outcome="Internal", message="the agent was killed before it could say why")


def follow(agent: AgentProcess, console: Console) -> int:
    """The agent's exit code; Ctrl-C once asks it to save and stop, twice ends it at once."""
    presses: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: presses.append(number)) for number in _STOPS}
    try:
        with open_display(console) as display:
            return _follow(agent, console, display, presses)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(agent: AgentProcess, console: Console, display: Display, presses: list[int]) -> int:
    heeded = 0
    while (code := agent.wait(_LOOK_SECONDS)) is None:
        document = agent.progress()
        if document is not None:
            display.show(document)
        if len(presses) > heeded:
            heeded = len(presses)
            if heeded == 1:
                console.print("Stopping: a checkpoint is saved first. Press Ctrl-C again to end at once.")
                agent.stop()
            else:
                agent.kill()
    return code
