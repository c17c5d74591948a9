"""An attempt that goes well: inputs, workers, checkpoints in the store, artifact, last words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from finetune_trainer.store.checkpoints import list_checkpoints
from finetune_trainer.store.objects import open_store


def steps_in(output: Path) -> list[int]:
    store, prefix = open_store(str(output))
    return [checkpoint.step for checkpoint in list_checkpoints(store, prefix)]


def test_success_publishes_the_artifact_and_stores_the_checkpoints(make_agent, output) -> None:
    agent = make_agent(does={"steps": 5, "save_every": 2, "step_seconds": 0.3})
    assert agent.execute() == 0, agent.out + agent.err
    assert json.loads((output / "adapter" / "adapter.json").read_text()) == {"step": 5, "resumedFrom": None}
    assert (output / "report.md").read_text() == "# Report\n"
    assert steps_in(output) == [5, 4, 2]
    message = agent.message
    assert (message.outcome, message.artifact, message.step, message.checkpoint_step) == ("Succeeded", "adapter", 5, 5)
    assert (message.base_eval_loss, message.eval_loss) == (3.5, 2.5)


def test_the_log_tells_the_story_one_event_per_line(make_agent) -> None:
    agent = make_agent(does={"steps": 2})
    assert agent.execute() == 0
    told = [json.loads(line)["event"] for line in agent.out.splitlines() if line.startswith("{")]
    told.remove("checkpoint stored")  # from the background: before or after the worker's end
    assert told == [
        "serving",
        "attempt begun",
        "inputs fetched",
        "workers started",
        "worker ended",
        "artifact published",
        "attempt ended",
    ]
    assert "step 2" in agent.out.splitlines()  # a single worker's own output is passed on as it is


def test_only_the_newest_checkpoints_stay_in_the_store_and_one_on_disk(make_agent, make_run, output) -> None:
    agent = make_agent(make_run(keep_last=2), does={"steps": 8, "save_every": 2, "step_seconds": 0.25})
    assert agent.execute() == 0
    assert steps_in(output) == [8, 6]
    assert sorted(path.name for path in (agent.work / "checkpoints").iterdir()) == ["step-8", "step-8.ready"]


def test_an_artifact_that_was_published_already_ends_the_next_attempt_at_once(make_agent, output) -> None:
    assert make_agent(does={"steps": 2}).execute() == 0
    again = make_agent(attempt=1, does={"fail_rank": 0})
    assert again.execute() == 0
    assert (again.message.outcome, again.message.artifact) == ("Succeeded", "adapter")
    assert again.events("workers started") == []


def test_an_orphan_of_a_worker_does_not_outlive_the_attempt(make_agent) -> None:
    agent = make_agent(does={"steps": 2, "orphan_seconds": 600})
    assert agent.execute() == 0
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(agent.work).encode() in _read(p)]
    assert alive == []


def test_pid_1_reaps_the_orphans_that_it_inherits(make_agent) -> None:
    """In a PID namespace of its own, as in a pod: an orphan that ends must not stay as a zombie."""
    probe = ("unshare", "--pid", "--fork", "--kill-child")
    if subprocess.run([*probe, "true"], capture_output=True).returncode != 0:
        pytest.skip("no PID namespace can be made here")
    agent = make_agent(does={"steps": 10_000, "orphan_seconds": 0.5}, launcher=probe).start()
    agent.wait_for_step(1)
    (pid_1,) = _children(agent.process.pid)
    deadline = time.monotonic() + 20
    while len(_children(pid_1)) > 1:  # the worker, and the orphan until it has ended and was reaped
        assert time.monotonic() < deadline, "the orphan stays"
        time.sleep(0.1)
    os.kill(pid_1, signal.SIGTERM)
    assert agent.finish() == 100


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
