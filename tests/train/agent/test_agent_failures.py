"""How the end of a worker becomes a class, a message and an exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_api.failures import TABLE


def test_the_first_failure_wins_and_the_survivor_is_collateral(make_agent, make_run) -> None:
    agent = make_agent(make_run(processes=2), does={"steps": 10_000, "fail_rank": 1, "fail_step": 3})
    assert agent.execute() == 65
    assert agent.message.outcome == "DataInvalid"
    assert agent.message.message.startswith("rank 1 met DataInvalid")
    assert agent.message.field == "spec.dataset.sources[0].uri"
    ended = {event["rank"]: event for event in agent.events("worker ended")}
    assert (ended[1]["code"], ended[1]["collateral"]) == (65, False)
    assert (ended[0]["signal"], ended[0]["collateral"]) == (9, True)
    assert "[rank 0] step 1" in agent.out.splitlines()


@pytest.mark.parametrize(
    ("how", "last_words", "outcome"),
    [
        ("code:83", "", "NonFiniteLoss"),
        ("code:1", "boom in the worker", "Internal"),
        ("signal:11", "", "Internal"),
        ("signal:9", "", "Internal"),
        ("class:OutOfGpuMemory", "", "OutOfGpuMemory"),
        ("class:Nonsense", "", "Internal"),
        ("full", "", "DiskFull"),
    ],
)
def test_a_worker_failure_gets_its_class(make_agent, how, last_words, outcome) -> None:
    agent = make_agent(does={"fail_rank": 0, "fail_how": how, "last_words": last_words})
    assert agent.execute() == TABLE[outcome].exit_code
    assert agent.message.outcome == outcome
    assert last_words in agent.message.message
    if how.startswith("signal"):
        assert "ended by signal SIG" in agent.message.message


def test_the_newest_local_checkpoint_is_stored_after_a_failure(make_agent, output) -> None:
    agent = make_agent(does={"steps": 9, "save_every": 2, "step_seconds": 0.0, "fail_rank": 0, "fail_step": 6})
    assert agent.execute() == 65
    assert agent.message.checkpoint_step == 4
    assert agent.message.step == 5


@pytest.fixture
def small_memory():
    """A cgroup that may use 200 MiB; the kernel counts what it kills there."""
    root = Path("/sys/fs/cgroup/memory")
    v1 = root.is_dir()
    group = (root if v1 else Path("/sys/fs/cgroup")) / f"finetune-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(200 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    group.rmdir()


def test_a_worker_that_eats_all_memory_is_out_of_host_memory(make_agent, small_memory) -> None:
    into = ("/bin/sh", "-c", f'echo $$ > {small_memory}/cgroup.procs; exec "$@"', "sh")
    agent = make_agent(does={"fail_rank": 0, "fail_how": "eat"}, launcher=into)
    assert agent.execute() == 81, agent.out + agent.err
    assert agent.message.outcome == "OutOfHostMemory"
    assert "memory limit" in agent.message.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "is not JSON"),
        ('{"version": 1, "surprise": 2}', "is not valid"),
        (None, "cannot read the run file"),
    ],
)
def test_a_wrong_run_file_is_refused_with_its_name(make_agent, text, words) -> None:
    agent = make_agent()
    agent.folder.mkdir()
    path = agent.folder / "other.json"
    if text is not None:
        path.write_text(text)
    agent.arguments = ("--run-file", str(path))
    assert agent.execute() == 64
    assert agent.message.outcome == "InvalidSpec"
    assert str(path) in agent.message.message
    assert words in agent.message.message


def test_data_that_changed_since_the_plan_is_refused(make_agent, make_run, tmp_path) -> None:
    run = make_run()
    with (tmp_path / "inputs" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "3 + 3 =", "completion": " 6"}\n')
    agent = make_agent(run)
    assert agent.execute() == 65
    assert agent.message.field == "spec.dataset.sources"
    assert "has changed since the run was planned" in agent.message.message


def test_an_output_of_another_job_is_refused(make_agent, make_run) -> None:
    assert make_agent().execute() == 0
    other = make_agent(make_run(uid="another-uid"))
    assert other.execute() == 71
    assert other.message.outcome == "OutputInUse"
    assert "team-a/tiny" in other.message.message


def test_workers_that_leave_no_artifact_are_an_internal_error(make_agent) -> None:
    agent = make_agent(does={"fail_rank": 0, "fail_how": "code:0"})
    assert agent.execute() == 101
    assert "no artifact" in agent.message.message
