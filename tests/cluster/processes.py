"""Starts, finds and stops our own host processes, and never signals anybody else's.

A process is ours when its pid *and* start time match the record, or when its environment carries our mark. The mark
finds what a killed `up` started but had no time to record.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "FINETUNE_TEST_CLUSTER"
# How long a restarted process waits for its old port, which a fault test leaves in TIME_WAIT for a moment.
PORT_WAIT_SECONDS = 5.0
SERVER_PORTS = range(20000, 32768)


class ProcessError(RuntimeError):
    """A component did not start, did not become ready or did not stop; the message ends with its last log lines."""


@dataclass(frozen=True)
class Component:
    """One host process: its name is also the name of its log and of its pid record."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    # True: the kernel ends the process with the one that started it, so that a killed test run leaves nothing behind.
    dies_with_parent: bool = False


def start_time(pid: int) -> int | None:
    """Kernel clock ticks from boot to the start of the process; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is a name in brackets, which may itself hold spaces and brackets.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


class ProcessTable:
    """The processes of one state folder: `pids/<name>.json` and `logs/<name>.log`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self.logs = folder / "logs"

    def start(self, component: Component) -> int:
        """Returns the pid of the running component; starts it, or restarts it when its command line changed."""
        running = self.pid(component.name)
        if running is not None:
            if self._record(component.name).get("argv") == list(component.argv):
                return running
            self.stop(component.name)
        self.pids.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        argv = list(component.argv)
        if component.dies_with_parent and (setpriv := shutil.which("setpriv")):
            argv = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        with self.log_path(component.name).open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **component.env, MARK: str(self.folder)},
                start_new_session=True,
            )
        self._write_record(component, process.pid)
        _CHILDREN[process.pid] = process
        return process.pid

    def stop(self, name: str, grace_seconds: float = 10.0) -> None:
        """The component is gone afterwards: SIGTERM, then SIGKILL after the grace. No error when it is not running."""
        pid = self.pid(name)
        if pid is not None:
            _end([pid], grace_seconds)
        (self.pids / f"{name}.json").unlink(missing_ok=True)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends one signal, for instance SIGSTOP to freeze it; raises ProcessError when it is not running."""
        pid = self.pid(name)
        if pid is None:
            raise ProcessError(f"{name} is not running")
        os.kill(pid, number)

    def pid(self, name: str) -> int | None:
        """The pid of the component when it runs and is provably ours."""
        record = self._record(name)
        pid = record.get("pid")
        if not isinstance(pid, int) or record.get("boot") != boot_id():
            return None
        child = _CHILDREN.get(pid)
        if child is not None:
            child.poll()
        started = start_time(pid)
        return pid if started is not None and started == record.get("start_time") else None

    def names(self) -> list[str]:
        """Every component with a record, running or not."""
        return sorted(path.stem for path in self.pids.glob("*.json")) if self.pids.exists() else []

    def stop_strays(self) -> list[int]:
        """Ends every process that carries our mark but has no record; returns their pids."""
        recorded = {self.pid(name) for name in self.names()}
        strays = [pid for pid in marked_pids(self.folder) if pid not in recorded]
        if strays:
            _end(strays, 5.0)
        return strays

    def log_path(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def log_tail(self, name: str, lines: int = 20) -> str:
        """The last lines of the component's log, or an empty string."""
        path = self.log_path(name)
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def wait_ready(self, name: str, probe: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
        """Returns once the probe says yes; raises ProcessError when the process ends or the time is up."""
        deadline = time.monotonic() + timeout_seconds
        while not probe():
            if self.pid(name) is None:
                raise ProcessError(f"{name} ended while starting; last log lines:\n{self.log_tail(name)}")
            if time.monotonic() > deadline:
                raise ProcessError(f"{name} not ready after {timeout_seconds:.0f} s; log:\n{self.log_tail(name)}")
            time.sleep(0.1)

    def _record(self, name: str) -> dict[str, object]:
        try:
            record = json.loads((self.pids / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write_record(self, component: Component, pid: int) -> None:
        record = {"pid": pid, "start_time": start_time(pid), "boot": boot_id(), "argv": list(component.argv)}
        path = self.pids / f"{component.name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(path)


# Children of this process must be reaped, else they stay as zombies and look alive to others.
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}


def marked_pids(folder: Path) -> list[int]:
    """Processes whose environment carries the mark of this state folder."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environ and start_time(int(entry.name)) is not None:
                found.append(int(entry.name))
    return found


def _end(pids: Sequence[int], grace_seconds: float) -> None:
    born = {pid: start_time(pid) for pid in pids}

    def alive() -> list[int]:
        for pid in born:
            if pid in _CHILDREN:
                _CHILDREN[pid].poll()
        return [pid for pid, started in born.items() if started is not None and start_time(pid) == started]

    for pid in alive():
        _signal(pid, signal.SIGTERM)
        # A component that a fault test froze cannot act on SIGTERM.
        _signal(pid, signal.SIGCONT)
    deadline = time.monotonic() + grace_seconds
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive():
        _signal(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (left := alive()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        raise ProcessError(f"processes {left} survived SIGKILL")
    for pid in born:
        _CHILDREN.pop(pid, None)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def boot_id() -> str:
    """Changes with each boot of the machine; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago on the address, outside the range that outgoing connections draw from.

    So nothing takes the port while a fault test keeps its server stopped.
    """
    for port in random.sample(SERVER_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise ProcessError(f"no free port on {address} among 100 tried")


def port_is_free(port: int, address: str = "127.0.0.1") -> bool:
    """Whether a server could bind the port now; waits a short while for a port that is just being released."""
    deadline = time.monotonic() + PORT_WAIT_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
        time.sleep(0.1)


def http_ok(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether a plain HTTP GET answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
