"""This node's workers as processes: started, reaped, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

from finetune_api.runfile import RunFile
from finetune_trainer.agent.cores import usable_cores
from finetune_trainer.agent.output import OutputPump, Tail
from finetune_trainer.agent.redaction import without_secrets
from finetune_trainer.agent.settings import Settings

_POLL_SECONDS = 0.02
# A process that the worker left behind may hold its output open for ever.
_DRAIN_SECONDS = 1.0
LOG_BYTES = 64 * 1024
"""How much of a rank's output is kept for after a failure: the stacks of all its threads fit."""
_ERROR_BYTES = 16 * 1024


@dataclass(frozen=True)
class Exit:
    """How a worker ended: an exit code, or the signal that killed it."""

    rank: int
    code: int | None
    signal: int | None
    by_agent: bool
    """Whether the agent had told it to end."""


def worker_environment(run: RunFile, settings: Settings, local_rank: int, master_port: int) -> dict[str, str]:
    """The environment of one worker: the agent's own without secrets, and its place in the gang."""
    processes = run.resources.processes_per_node
    environment = without_secrets(settings.environment)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    environment.update(
        RANK=str(settings.node_rank * processes + local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(run.world_size),
        LOCAL_WORLD_SIZE=str(processes),
        NODE_RANK=str(settings.node_rank),
        # One node alone needs no name service to meet itself.
        MASTER_ADDR=settings.master if run.resources.nodes > 1 else "127.0.0.1",
        MASTER_PORT=str(master_port),
        TORCH_FORCE_WEIGHTS_ONLY_LOAD="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        PYTHONUNBUFFERED="1",
    )
    return environment


def free_port() -> int:
    """A TCP port of this host that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gang:
    """The workers of this node. Only the main thread may use it: workers die with the thread that started them."""

    def __init__(self, run: RunFile, settings: Settings) -> None:
        self._run = run
        self._settings = settings
        self._first_rank = settings.node_rank * run.resources.processes_per_node
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._errors: dict[int, Tail] = {}
        self._logs: dict[int, Tail] = {}
        self._pumps: list[OutputPump] = []
        self._told_to_end: set[int] = set()

    @property
    def ranks(self) -> range:
        """The ranks of this node's workers."""
        return range(self._first_rank, self._first_rank + self._run.resources.processes_per_node)

    @property
    def is_whole(self) -> bool:
        """Whether these are all workers of the run."""
        return self._run.resources.nodes == 1

    @property
    def running(self) -> tuple[int, ...]:
        """The ranks that have not ended, as far as the last `reap` saw."""
        return tuple(self._running)

    def start(self) -> None:
        """Every worker is started. Raises OSError if a process cannot be made."""
        port = self._settings.master_port or free_port()
        command = [
            sys.executable,
            "-m",
            "finetune_trainer.agent.tether",
            str(os.getpid()),
            str(int(signal.SIGKILL)),
            self._settings.worker_module,
            "--run-file",
            str(self._settings.run_file.absolute()),
            "--work",
            str(self._settings.work),
        ]
        for local_rank, rank in enumerate(self.ranks):
            environment = worker_environment(self._run, self._settings, local_rank, port)
            self._start_one(rank, command, environment)

    def _start_one(self, rank: int, command: list[str], environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running[rank] = process
        prefix = f"[rank {rank}] " if self._run.world_size > 1 else ""
        log, errors = self._logs[rank], self._errors[rank] = Tail(LOG_BYTES), Tail(_ERROR_BYTES)
        out = OutputPump(cast(BinaryIO, process.stdout), sys.stdout.buffer, prefix, log)
        err = OutputPump(cast(BinaryIO, process.stderr), sys.stderr.buffer, prefix, log, errors)
        for pump in (out, err):
            self._pumps.append(pump)
            pump.start()

    def reap(self) -> list[Exit]:
        """The workers that ended since the last call, oldest first as far as the kernel tells.

        What they left running in their sessions ends with them. Processes of others that ended as children of ours are
        taken in too: PID 1 inherits every orphan.
        """
        exits = []
        by_pid = {process.pid: rank for rank, process in self._running.items()}
        while (ended := _peek()) is not None:
            rank = by_pid.get(ended)
            if rank is None:
                os.waitpid(ended, 0)
                continue
            # Before the reaping, while the group's number cannot have passed to others.
            _signal_group(ended, signal.SIGKILL)
            code = self._running.pop(rank).wait()
            exits.append(
                Exit(rank, code if code >= 0 else None, -code if code < 0 else None, rank in self._told_to_end)
            )
        return exits

    def dump_stacks(self) -> None:
        """Every worker is asked to write its stacks to its standard error (faulthandler on SIGUSR1)."""
        for process in self._running.values():
            # Not send_signal: it would reap a worker that has just ended, and `reap` would wait for it for ever.
            os.kill(process.pid, signal.SIGUSR1)

    def end(self, kill_seconds: float) -> list[Exit]:
        """No worker runs any more, nor anything they started in their sessions.

        SIGTERM, then SIGKILL after kill_seconds. Returns the exits that this call saw.
        """
        exits = self.reap()  # what ended before it was told to is no collateral
        self._told_to_end.update(self._running)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + kill_seconds
        while self._running and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            exits += self.reap()
        self._signal(signal.SIGKILL)
        while self._running:
            time.sleep(_POLL_SECONDS)
            exits += self.reap()
        self._drain()
        return exits

    def error_tail(self, rank: int) -> str:
        """The end of what rank wrote to its standard error."""
        return self._errors[rank].text() if rank in self._errors else ""

    def logs(self) -> dict[int, str]:
        """The end of what each rank printed, at most LOG_BYTES of each."""
        return {rank: tail.text() for rank, tail in self._logs.items()}

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_SECONDS
        for pump in self._pumps:
            pump.join(max(0.0, deadline - time.monotonic()))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            _signal_group(process.pid, number)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _peek() -> int | None:
    """The pid of a child that has ended and is not yet reaped."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None else None
