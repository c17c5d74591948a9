"""The agent with the real worker: two ranks, one of which is killed or stuck, and the attempt that goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from finetune_api.runfile import RunFile
from tests.train.agent.runs import run_file
from tests.train.models import tiny_model

WORKER = "finetune_trainer.worker"


@pytest.fixture
def real_run(tmp_path: Path, output: Path) -> RunFile:
    data = tmp_path / "sums.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"}) + "\n" for n in range(40))
    )
    run = run_file(tiny_model("llama").as_uri(), data.as_uri(), output.as_uri(), processes=2, scratch=tmp_path / "s")
    long = run.hyperparameters.model_copy(update={"total_steps": 120, "max_sequence_length": 64})
    return run.model_copy(
        update={
            "hyperparameters": long,
            "dataset": run.dataset.model_copy(update={"prompt_template": "{prompt}{completion}"}),
            "checkpoint": run.checkpoint.model_copy(update={"every_steps": 10}),
        }
    )


def test_a_killed_rank_is_named_and_the_next_attempt_goes_on(make_agent, real_run, output) -> None:
    first = make_agent(real_run, module=WORKER).start()
    first.wait_for_event("checkpoint stored")
    os.kill(_pid_of_rank(first.process.pid, 1), signal.SIGKILL)
    assert first.finish() == 101
    assert first.message.outcome == "Internal"
    assert first.message.message.startswith("rank 1 was ended by signal SIGKILL")
    stored = first.message.checkpoint_step
    assert stored is not None and stored % 10 == 0
    second = make_agent(real_run, module=WORKER, attempt=1)
    assert second.execute() == 0, second.out + second.err
    assert second.events("attempt begun")[0]["resumed_from_step"] == stored
    assert (second.message.artifact, second.message.step, second.message.checkpoint_step) == ("model", 120, 120)
    assert (output / "model" / "model.safetensors").exists()
    assert (output / "report.md").exists()


@pytest.mark.slow
def test_a_stuck_data_loader_is_named_with_its_rank_and_the_stacks(make_agent, real_run, output) -> None:
    module = "tests.train.agent.stuck_worker"
    agent = make_agent(real_run, module=module, arguments=("--hang-seconds", "20"))
    assert agent.execute() == 84, agent.out + agent.err
    message = agent.message.message
    assert "Rank 1 fell silent first, while reading data; rank 0 held up while waiting for the other ranks." in message
    assert "in stage Training" in message
    stacks = {rank: (output / "logs" / "attempt-0" / f"rank-{rank}.log").read_text() for rank in (0, 1)}
    assert "stuck_worker.py" in stacks[1] and "in get_batch_samples" in stacks[1]
    assert "in all_reduce" in stacks[0]


def _pid_of_rank(agent: int, rank: int) -> int:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    )
