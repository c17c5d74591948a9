"""A real run whose data has a poisoned stretch: the loss rises, the agent goes back with a lower rate, the run ends well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunFile, RunGuards
from tests.train.agent.runs import run_file
from tests.train.models import tiny_model

STEPS, RECORDS, SEED, RATE = 48, 2, 7, 1e-2
POISONED = (31, 32, 33)


@pytest.fixture
def poisoned(tmp_path: Path, output: Path) -> RunFile:
    """At the planned rate three steps of nonsense do so much damage that the next step is as bad; at half of it not."""
    words = ["red", "blue", "green", "black", "white", "grey"]
    rows = [{"prompt": f"say {word} {n}: ", "completion": word * 2} for n, word in enumerate(words * 20)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED * 1_000_003)).tolist()
    for step in POISONED:
        for record in order[(step - 1) * RECORDS : step * RECORDS]:
            rows[record]["completion"] = "zzzqqq xyx"
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_file(tiny_model("llama").as_uri(), data.as_uri(), output.as_uri(), scratch=tmp_path / "s")
    changes = {
        "total_steps": STEPS,
        "learning_rate": RATE,
        "micro_batch_size": RECORDS,
        "max_sequence_length": 64,
        "seed": SEED,
    }
    return run.model_copy(
        update={
            "hyperparameters": run.hyperparameters.model_copy(update=changes),
            "dataset": run.dataset.model_copy(update={"prompt_template": "{prompt}{completion}"}),
            "checkpoint": run.checkpoint.model_copy(update={"every_steps": 3}),
            "guards": RunGuards(
                loss_spike=LossSpikeGuard.ROLLBACK, window=16, spike_steps=4, rollback_steps=4, lowered_steps=8
            ),
        }
    )


def test_a_poisoned_stretch_is_passed_at_half_the_rate_and_the_planned_one_is_back_after_it(
    make_agent, poisoned, output
) -> None:
    agent = make_agent(poisoned, module="finetune_trainer.worker")
    assert agent.execute() == 0, agent.out + agent.err
    (told,) = agent.events("guard")
    (rollback,) = told["rollbacks"]
    assert (rollback["onsetStep"], rollback["reason"], rollback["factor"]) == (POISONED[0], "LossSpike", 0.5)
    resumed = agent.message.resumed_from_step
    assert resumed <= POISONED[0] - 4

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)), "what was thrown away is in no curve"
    lowered = [line["step"] for line in steps if line["learningRate"] == RATE / 2]
    assert lowered == list(range(resumed + 1, POISONED[0] + 8 + 1))
    assert {line["learningRate"] for line in steps} == {RATE, RATE / 2}
    last = [line["loss"] for line in steps[-5:]]
    assert max(last) < min(line["loss"] for line in steps if line["step"] in POISONED)
    report = json.loads((output / "report.json").read_text())
    assert report["guards"]["rollbacks"] == [rollback]
    assert "back to an earlier checkpoint" in (output / "report.md").read_text()
