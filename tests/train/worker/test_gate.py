"""The gate evaluation.require: a worse model ends as RequirementNotMet, and nothing that it made is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.evaluation import Requirement
from finetune_api.failures import TABLE
from finetune_api.runfile import RunFile
from tests.train.agent.runs import Agent, run_file
from tests.train.worker.runs import made_model, records


@pytest.mark.parametrize(
    ("bounds", "value", "met"),
    [
        ({"min": 0.5}, 0.5, True),
        ({"min": 0.5}, 0.4999, False),
        ({"max": 2.0}, 2.0, True),
        ({"max": 2.0}, 2.0001, False),
        ({"min": 1, "max": 2}, 1.5, True),
        ({"min": 1, "max": 2}, 2.5, False),
        ({"min": 0}, None, False),
        ({"max": 10}, float("nan"), False),
    ],
)
def test_a_bound_passes_itself_and_what_was_not_measured_fails(bounds: Any, value: float | None, met: bool) -> None:
    from finetune_trainer.worker.evaluate.gate import judge, unmet_message

    metrics = {} if value is None else {"accuracy": value}
    (verdict,) = judge([Requirement(metric="accuracy", **bounds)], metrics)
    assert verdict.met is met
    assert (unmet_message([verdict]) is None) is met


def test_the_message_names_metric_value_and_bound() -> None:
    from finetune_trainer.worker.evaluate.gate import judge, unmet_message

    require = [Requirement(metric="loss", max=2), Requirement(metric="f1", min=0.9), Requirement(metric="bleu", min=1)]
    message = unmet_message(judge(require, {"loss": 1.0, "f1": 0.25}))
    assert message is not None
    assert "f1 is 0.25, but has to be at least 0.9; bleu was not measured, but has to be at least 1" in message
    assert "loss" not in message


@pytest.fixture
def demanding(tmp_path: Path) -> RunFile:
    """A run of two steps that asks for a loss that it cannot reach."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in records()))
    run = run_file(made_model().as_uri(), data.as_uri(), (tmp_path / "output").as_uri(), scratch=tmp_path / "scratch")
    document = run.to_json()
    document["dataset"] |= {"validationFraction": 0.2}
    document["hyperparameters"] |= {"totalSteps": 2, "maxSequenceLength": 64}
    document["evaluation"] = {"generation": {"maxNewTokens": 4}, "require": [{"metric": "loss", "max": 0.001}]}
    return RunFile.from_json(document)


def test_a_job_of_evaluation_publishes_its_report_and_the_gate_holds(
    demanding: RunFile, tmp_path: Path, agents: list[Agent]
) -> None:
    document = demanding.to_json()
    document["objective"] = {"type": "Evaluation"}
    document["dataset"].pop("validationFraction")
    document["hyperparameters"] |= {"totalSteps": 0, "learningRate": 0.0}
    agent = Agent(RunFile.from_json(document), tmp_path / "agent", module="finetune_trainer.worker")
    agents.append(agent)
    assert agent.execute() == 72, agent.out + agent.err
    assert agent.message.artifact == "report"
    assert agent.message.eval_loss is not None
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"ARTIFACT.json", "report.json", "report.md", "predictions.jsonl"} <= names
    assert not names & {"model", "adapter", "checkpoints"}


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[Agent]]:
    made: list[Agent] = []
    yield made
    for agent in made:
        if agent.process is not None and agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()


def test_a_model_that_misses_a_bound_is_published_and_the_job_fails(
    demanding: RunFile, tmp_path: Path, agents: list[Agent]
) -> None:
    first = Agent(demanding, tmp_path / "agent-0", module="finetune_trainer.worker")
    agents.append(first)
    assert first.execute() == TABLE["RequirementNotMet"].exit_code == 72, first.out + first.err
    message = first.message
    assert message.outcome == "RequirementNotMet"
    assert "loss is" in message.message and "at most 0.001" in message.message
    assert message.field == "spec.evaluation.require"
    assert message.artifact == "model"
    assert message.eval_loss is not None and message.base_eval_loss is not None
    output = tmp_path / "output"
    report = json.loads((output / "report.json").read_text())
    assert [item["met"] for item in report["evaluation"]["requirements"]] == [False]
    assert "| loss | max 0.001 |" in (output / "report.md").read_text()
    assert {"ARTIFACT.json", "model", "predictions.jsonl"} <= {path.name for path in output.iterdir()}
    assert (output / "model/model.safetensors").is_file()

    second = Agent(demanding, tmp_path / "agent-1", module="finetune_trainer.worker", attempt=1)
    agents.append(second)
    assert second.execute() == 72, "an attempt that finds the artifact published says the same of it"
    assert second.events("workers started") == []
    assert second.message.message == message.message
    assert second.message.eval_loss == message.eval_loss
