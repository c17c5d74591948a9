"""Only our own processes are ever signalled, and none of them is forgotten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import MARK, Component, ProcessError, ProcessTable, marked_pids, start_time

SLEEP = Component("sleeper", ["sleep", "300"])


@pytest.fixture
def table(tmp_path: Path) -> Iterator[ProcessTable]:
    made = ProcessTable(tmp_path)
    yield made
    for name in made.names():
        made.stop(name)
    made.stop_strays()


def test_a_second_start_keeps_the_process(table: ProcessTable) -> None:
    assert table.start(SLEEP) == table.start(SLEEP)


def test_a_changed_command_line_restarts_the_process(table: ProcessTable) -> None:
    first = table.start(SLEEP)
    second = table.start(Component("sleeper", ["sleep", "301"]))
    assert second != first
    assert start_time(first) is None


def test_a_pid_that_was_given_to_somebody_else_is_not_signalled(table: ProcessTable) -> None:
    foreign = subprocess.Popen(["sleep", "300"])
    try:
        # Start times have a resolution of 10 ms.
        time.sleep(0.05)
        table.start(SLEEP)
        record = table.pids / "sleeper.json"
        told = json.loads(record.read_text())
        record.write_text(json.dumps({**told, "pid": foreign.pid}))
        assert table.pid("sleeper") is None
        table.stop("sleeper")
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_a_process_without_a_record_is_found_by_its_mark(table: ProcessTable) -> None:
    stray = subprocess.Popen(["sleep", "300"], env={**os.environ, MARK: str(table.folder)})
    other = subprocess.Popen(["sleep", "300"], env={**os.environ, MARK: str(table.folder) + "-other"})
    try:
        assert table.stop_strays() == [stray.pid]
        assert stray.wait(5) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        for process in (stray, other):
            process.kill()
            process.wait()


def test_a_frozen_process_that_ignores_sigterm_is_stopped(table: ProcessTable) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
    )
    pid = table.start(Component("stubborn", [sys.executable, "-c", script]))
    table.wait_ready("stubborn", lambda: "up" in table.log_tail("stubborn"), 20)
    table.signal("stubborn", signal.SIGSTOP)
    table.stop("stubborn", grace_seconds=0.3)
    assert start_time(pid) is None


def test_a_component_that_ends_while_starting_is_reported_with_its_last_words(table: ProcessTable) -> None:
    table.start(Component("broken", ["sh", "-c", "echo no such flag; exit 3"]))
    with pytest.raises(ProcessError, match=r"broken ended while starting(.|\n)*no such flag"):
        table.wait_ready("broken", lambda: False, 20)


def test_a_killed_test_run_leaves_no_process(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib, signal\n"
        "from tests.cluster.processes import Component, ProcessTable\n"
        "ProcessTable(pathlib.Path(sys.argv[1])).start(Component('s', ['sleep', '300'], dies_with_parent=True))\n"
        "import time; time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert (tmp_path / "pids" / "s.json").exists()
    deadline = time.monotonic() + 5
    while marked_pids(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_pids(tmp_path) == []
