"""The best step: early stopping, the best model kept and published, and both across an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.worker.carry import Carry
from finetune_trainer.worker.evaluate.best import BestPolicy
from tests.train.methods.case import Case
from tests.train.worker.runs import Work, in_child, records

# Rows whose answers contradict the held-out ones: learning them makes the evaluation worse after a few steps.
TRAIN = [{"prompt": f"say {word}: ", "completion": word[::-1]} for word in ("red", "blue", "green", "black")] * 6
HELD_OUT = [{"prompt": f"say {word}: ", "completion": word} for word in ("red", "blue", "green", "black")]


def worsening(root: Path, processes: int = 1, **hyperparameters: Any) -> Work:
    """A run of up to 30 steps, evaluated at each second one, whose held-out loss falls and then rises."""
    return Case(
        "best",
        {"spread": 0.2, "width": 64},
        TRAIN,
        {
            "dataset": {"validationFraction": None, "validation": {"uri": "s3://b/v.jsonl", "access": {}}},
            "hyperparameters": {"totalSteps": 30, "microBatchSize": 4, "schedule": "Constant", **hyperparameters},
            "evaluation": {"everySteps": 2},
            "checkpoint": {"keepLast": 1, "everySteps": 3},
            "resources": {"processesPerNode": processes},
        },
        folders={"validation": HELD_OUT},
    ).work(root)


STOP = {"earlyStopping": {"patience": 3, "minDelta": 0.0}}


def evaluations(work: Work) -> list[tuple[int, float]]:
    return [(line["step"], line["evalLoss"]) for line in work.metrics() if "evalLoss" in line and line["step"] > 0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = worsening(tmp_path_factory.mktemp("early") / "w", **STOP)
    assert work.train() == [0], work.logged()
    return work


def test_a_run_stops_after_its_patience_without_improvement(stopped: Work) -> None:
    losses = evaluations(stopped)
    best = min(range(len(losses)), key=lambda k: losses[k][1])
    assert best + 1 + 3 == len(losses), "three evaluations after the best one, and no more"
    training = stopped.read("artifact/report.json")["training"]
    assert training["stoppedEarly"] is True
    assert training["steps"] == losses[-1][0] < 30
    assert training["publishedStep"] == losses[best][0]


def test_the_published_model_is_the_best_one(stopped: Work) -> None:
    losses = dict(evaluations(stopped))
    report = stopped.read("artifact/report.json")
    best = report["training"]["publishedStep"]
    assert report["evaluation"]["tuned"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert stopped.read("state/result.json")["evalLoss"] == report["evaluation"]["tuned"]["loss"]
    assert in_child(_same, str(stopped.root / f"checkpoints/step-{best}"), str(stopped.root / "artifact/adapter"))
    assert not in_child(
        _same, str(stopped.root / f"checkpoints/step-{max(losses)}"), str(stopped.root / "artifact/adapter")
    )


def _same(first: str, second: str) -> bool:
    import torch
    from safetensors.torch import load_file

    one, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_step_has_a_checkpoint_and_its_marker_says_so(stopped: Work) -> None:
    report = stopped.read("artifact/report.json")
    best = report["training"]["publishedStep"]
    assert stopped.read(f"checkpoints/step-{best}.ready")["best"] == [best]
    last = report["training"]["steps"]
    assert stopped.read(f"checkpoints/step-{last}.ready")["best"] == [best]


def test_the_memory_of_the_patience_survives_an_interruption(stopped: Work, tmp_path: Path) -> None:
    """Interrupted at a step after the best one, the run stops where it would have stopped, with the same model."""
    report = stopped.read("artifact/report.json")
    best, last = report["training"]["publishedStep"], report["training"]["steps"]
    at = next(step for step in range(3, 30, 3) if best < step < last)
    resumed = stopped.resumed_from(stopped, at, tmp_path / "resumed")
    shutil.copytree(stopped.root / f"checkpoints/step-{best}", resumed.root / "best")
    assert resumed.train() == [0], resumed.logged()
    assert resumed.read("artifact/report.json")["training"]["steps"] == last
    assert evaluations(resumed) == evaluations(stopped)
    assert in_child(_same, str(stopped.root / "artifact/adapter"), str(resumed.root / "artifact/adapter"))


def test_an_evaluation_that_is_caught_up_ends_the_run_before_another_step(stopped: Work, tmp_path: Path) -> None:
    """Interrupted between the last step and its evaluation, the run makes that evaluation first, and no step."""
    report = stopped.read("artifact/report.json")
    best, last = report["training"]["publishedStep"], report["training"]["steps"]
    resumed = stopped.resumed_from(stopped, last, tmp_path / "resumed")
    shutil.copytree(stopped.root / f"checkpoints/step-{best}", resumed.root / "best")
    carried, state = resumed.read("resume/run.json"), resumed.read("resume/trainer_state.json")
    assert (carried["stopped_early"], carried["waited"]) == (True, 3)
    (resumed.root / "resume/run.json").write_text(json.dumps({**carried, "stopped_early": False, "waited": 2}))
    history = [entry for entry in state["log_history"] if not ("eval_loss" in entry and entry["step"] == last)]
    state["log_history"] = history
    (resumed.root / "resume/trainer_state.json").write_text(json.dumps(state))
    assert resumed.train() == [0], resumed.logged()
    training = resumed.read("artifact/report.json")["training"]
    assert (training["steps"], training["publishedStep"], training["stoppedEarly"]) == (last, best, True)
    assert evaluations(resumed) == evaluations(stopped)


def test_a_resumed_run_without_its_best_checkpoint_says_so(stopped: Work, tmp_path: Path) -> None:
    last = stopped.read("artifact/report.json")["training"]["steps"]
    resumed = stopped.resumed_from(stopped, last, tmp_path / "resumed")
    assert resumed.train() == [87], resumed.logged()
    assert "was the best one" in resumed.read("state/error-0.json")["message"]


def test_the_best_of_several_is_published_without_early_stopping(tmp_path: Path) -> None:
    work = worsening(tmp_path / "w", totalSteps=12, learningRate=2e-2)
    run = work.run.model_copy(update={"checkpoint": work.run.checkpoint.model_copy(update={"keep_best": 2})})
    work = Work(work.root, run)
    assert work.train() == [0], work.logged()
    losses = evaluations(work)
    ranked = [step for step, _ in sorted(losses, key=lambda found: found[1])]
    training = work.read("artifact/report.json")["training"]
    assert (training["publishedStep"], training["steps"]) == (ranked[0], 12)
    assert work.read("checkpoints/step-12.ready")["best"] == ranked[:2]


def test_the_best_step_is_the_one_with_the_best_of_the_metric_that_is_asked_for(tmp_path: Path) -> None:
    work = worsening(tmp_path / "w", totalSteps=12, learningRate=2e-2)
    changes = {"keep_best": 2, "best_metric": "tokenAccuracy"}
    run = work.run.model_copy(update={"checkpoint": work.run.checkpoint.model_copy(update=changes)})
    work = Work(work.root, run)
    assert work.train() == [0], work.logged()
    history = work.read("checkpoints/step-12/trainer_state.json")["log_history"]
    measured = {e["step"]: e["eval_tokenAccuracy"] for e in history if "eval_loss" in e and e["step"]}
    losses = dict(evaluations(work))
    ranked = sorted(measured, key=lambda step: -measured[step])
    assert ranked[0] != min(losses, key=lambda step: losses[step]), "the two metrics choose different steps here"
    report = work.read("artifact/report.json")
    assert (report["training"]["publishedStep"], report["training"]["bestMetric"]) == (ranked[0], "tokenAccuracy")
    assert report["evaluation"]["tuned"]["tokenAccuracy"] == pytest.approx(measured[ranked[0]])
    assert work.read("checkpoints/step-12.ready")["best"] == ranked[:2]
    assert "the best by tokenAccuracy" in (work.root / "artifact/report.md").read_text()


def test_patience_counts_what_is_no_improvement_of_the_metric() -> None:
    policy, carry = BestPolicy(1, "accuracy", patience=2, min_delta=0.05), Carry(best_metric="accuracy")
    found = [
        policy.judge(carry, step, {"loss": 1.0 / step, "accuracy": a}) for step, a in ((1, 0.5), (2, 0.52), (3, 0.6))
    ]
    assert (found, carry.best, carry.waited) == ([True, True, True], [[3, 0.6]], 0)
    assert not policy.judge(carry, 4, {"loss": 0.0, "accuracy": 0.6}), "of equal steps the earlier one is the better"
    assert not carry.stopped_early
    policy.judge(carry, 5, {"loss": 0.0, "accuracy": 0.1})
    assert carry.stopped_early


def test_a_run_that_goes_on_with_another_metric_forgets_the_best_of_the_old_one() -> None:
    carry = Carry(best=[[2, 0.1]], waited=1)
    BestPolicy(1).adopt(carry)
    assert (carry.best, carry.waited) == ([[2, 0.1]], 1)
    BestPolicy(1, "accuracy").adopt(carry)
    assert (carry.best, carry.waited, carry.best_metric) == ([], 0, "accuracy")


def test_without_either_the_last_step_is_published(tmp_path: Path) -> None:
    work = worsening(tmp_path / "w", totalSteps=6)
    assert work.train() == [0], work.logged()
    assert work.read("artifact/report.json")["training"]["publishedStep"] == 6
    assert not (work.root / "best").exists()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.slow
def test_the_best_model_comes_back_under_zero(tmp_path: Path, stage: int) -> None:
    work = worsening(tmp_path / "w", zeroStage=stage, totalSteps=12, learningRate=3e-2, **STOP)
    assert work.train() == [0], work.logged()
    report, losses = work.read("artifact/report.json"), dict(evaluations(work))
    best = report["training"]["publishedStep"]
    assert best < report["training"]["steps"]
    assert report["evaluation"]["tuned"]["loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.slow
def test_every_process_has_the_best_weights_at_the_end(tmp_path: Path) -> None:
    """Each of two processes evaluates half of the records, so that one with other weights would change the loss."""
    work = worsening(tmp_path / "w", 2, totalSteps=12, microBatchSize=2, learningRate=3e-2, **STOP)
    assert work.train() == [0, 0], work.logged()
    report, losses = work.read("artifact/report.json"), dict(evaluations(work))
    best = report["training"]["publishedStep"]
    assert best < report["training"]["steps"]
    assert report["evaluation"]["tuned"]["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_early_stopping_without_evaluations_is_refused(tmp_path: Path) -> None:
    work = Case("best", {}, records(), {"hyperparameters": STOP}).work(tmp_path / "w")
    assert work.train() == [64], work.logged()
    assert "evaluation.everySteps" in work.read("state/error-0.json")["message"]
