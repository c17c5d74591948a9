"""An interrupted run equals an uninterrupted one, step by step and to the bit (CPU)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_data import CASES as DATA
from tests.train.methods.cases_preference import pairs, preference
from tests.train.methods.cases_pretrain import CASES as PRETRAIN
from tests.train.worker.runs import FULL, LORA, QLORA, Work, in_child, launch, records, work_for
from tests.train.worker.test_preference_runs import same_weights

DROPOUT = {"lora": {**LORA, "dropout": 0.2}}
# Each evaluation after the first one is worse than asked for, so that the fourth, at step 8 of 9, ends the run.
IMPATIENT = {"earlyStopping": {"patience": 3, "minDelta": 10.0}}
NF4 = {"type": "QLoRA", "quantization": QLORA["quantization"]}
FIRST_SCALE = 2.0**24
BY_NAME = {case.name: case for case in (*DATA, *PRETRAIN)}
# Steps 3 and 8 lie in the middle of an epoch of five steps (the packed one has four, the windows give six).
METHODS = {
    "LoRA, grouped, early stopping": Case(
        "lora",
        {},
        records(),
        {"tuning": DROPOUT, "hyperparameters": {"groupByLength": True, "warmupRatio": 0.25, **IMPATIENT}},
    ),
    "Full, packed": Case(
        "full",
        {"family": "gpt2", "dropout": 0.2},
        records(60),
        {
            "tuning": FULL,
            "hyperparameters": {"packing": True, "maxSequenceLength": 96, "schedule": "Cosine", "neftuneAlpha": 5.0},
        },
    ),
    # rank 64 gives tensors large enough for states of 8 bits
    "QLoRA": Case(
        "qlora",
        {"width": 64},
        records(),
        {
            "tuning": {**NF4, "lora": {"rank": 64, "dropout": 0.2}},
            "hyperparameters": {"precision": "BF16", "optimizer": "PagedAdamW8bit", "gradientCheckpointing": True},
        },
    ),
    "DPO": Case("dpo", {"spread": 0.2}, pairs(), preference("DPO")),
    "balanced labels": BY_NAME["classification-balanced"],
    "redrawn windows": BY_NAME["pretrain-character"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_within_an_epoch_repeats_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, method: str
) -> None:
    """The whole history: losses, gradient norms, learning rates, epochs, evaluations; then weights and report."""
    changes = {
        "hyperparameters": {"totalSteps": 9},
        "evaluation": {"everySteps": 2},
        "checkpoint": {"everySteps": 3, "keepLast": 9},
    }
    whole = METHODS[method].work(tmp_path / "whole", changes)
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 3, tmp_path / "resumed")
    if best := whole.read("checkpoints/step-3/run.json")["best"]:
        shutil.copytree(whole.root / f"checkpoints/step-{best[0][0]}", resumed.root / "best")
    assert resumed.train() == [0], resumed.logged()

    steps = whole.read("artifact/report.json")["training"]["steps"]
    assert steps == (8 if "early" in method else 9)
    history = _history(resumed, steps)
    assert history == _history(whole, steps), "the first three steps are carried over"
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, steps + 1))
    evaluated = [entry["step"] for entry in history if "eval_loss" in entry and entry["step"] > 0]
    assert evaluated == sorted({2, 4, 6, 8, steps})
    assert in_child(same_weights, str(whole.root), str(resumed.root))
    assert resumed.read("state/progress.json")["resumedFromStep"] == 3
    first, second = whole.read("artifact/report.json"), resumed.read("artifact/report.json")
    assert second["evaluation"] == first["evaluation"], "the base's loss travels in the checkpoint"
    assert second.get("answers") == first.get("answers")
    assert second["training"]["tokens"] == first["training"]["tokens"]
    assert second["training"]["publishedStep"] == first["training"]["publishedStep"]


def _history(work: Work, step: int) -> list[dict[str, Any]]:
    """All that was logged up to a step, but how long it took."""
    entries = work.read(f"checkpoints/step-{step}/trainer_state.json")["log_history"]
    timed = ("tokens_per_second", "runtime", "per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in entries]


def test_the_scale_of_fp16_gradients_goes_on_and_skipped_steps_are_counted_on(tmp_path: Path) -> None:
    """FP16 needs a GPU; here the same scaler and autocast run on the CPU. The first steps are skipped, and so later ones:
    a scale that began anew would skip others."""
    whole = _written(work_for(tmp_path / "whole", totalSteps=9, saveSteps=2, learningRate=1e-3, **FULL))
    assert launch(_train_scaled, 1, str(whole.root)) == [0]
    resumed = _written(whole.resumed_from(whole, 2, tmp_path / "resumed"))
    assert resumed.read("resume/run.json")["skipped_steps"] == 2
    assert launch(_train_scaled, 1, str(resumed.root)) == [0]
    assert _history(resumed, 9) == _history(whole, 9)
    scales = [in_child(_scaler, str(work.root / "checkpoints/step-8/scaler.pt")) for work in (whole, resumed)]
    assert scales[0] == scales[1]
    assert scales[0]["scale"] != in_child(_scaler, str(resumed.root / "resume/scaler.pt"))["scale"] < FIRST_SCALE


def _written(work: Work) -> Work:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


def _train_scaled(root: str, env: dict[str, str]) -> int:
    """The worker with the scaler and the autocast of FP16."""
    os.environ.update(env)
    import torch

    from finetune_trainer.worker.engine import Engine
    from finetune_trainer.worker.main import main

    plain = Engine.__init__

    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **named)
        self.args.fp16 = True
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=2)

    Engine.__init__ = initialise  # type: ignore[method-assign]
    return main(["--run-file", f"{root}/run.json", "--work", root])


def _scaler(path: str) -> dict[str, Any]:
    import torch

    return torch.load(path, weights_only=True)


def test_a_checkpoint_without_the_scale_of_fp16_is_refused(finished: Work, tmp_path: Path) -> None:
    halved = work_for(tmp_path / "halved", precision="FP16").resumed_from(finished, 2, tmp_path / "resumed")
    assert halved.train() == [87], halved.logged()
    assert "it lacks scaler.pt" in halved.read("state/error-0.json")["message"]


def test_a_run_that_had_made_all_its_steps_only_finishes(tmp_path: Path) -> None:
    whole = work_for(tmp_path / "whole")
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 4, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    assert [s for s, _, _ in whole.losses("checkpoints/step-4")] == [1, 2, 3, 4]
    assert resumed.metrics() == whole.metrics(), "no step was made twice"
    assert resumed.read("state/result.json") == whole.read("state/result.json")


def test_a_lower_learning_rate_is_taken_over_on_resume(tmp_path: Path) -> None:
    whole = work_for(tmp_path / "whole", totalSteps=4, saveSteps=2, schedule="Constant", learningRate=1e-2)
    assert whole.train() == [0], whole.logged()
    lower = work_for(tmp_path / "lower", totalSteps=4, schedule="Constant", learningRate=1e-3)
    shutil.copytree(whole.root / "checkpoints/step-2", lower.root / "resume")
    assert lower.train() == [0], lower.logged()
    assert [line["learningRate"] for line in lower.metrics() if "loss" in line] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-3]
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("optimizer.pt", "it lacks optimizer.pt"),
        ("rng_state.pth", "it lacks rng_state.pth"),
        ("trainer_state.json", "trainer_state.json cannot be read"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(finished: Work, tmp_path: Path, broken: str, message: str) -> None:
    resumed = finished.resumed_from(finished, 2, tmp_path / "resumed")
    (resumed.root / "resume" / broken).unlink()
    assert resumed.train() == [87], resumed.logged()
    error = resumed.read("state/error-0.json")
    assert error["class"] == "CheckpointInvalid"
    assert message in error["message"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A finished run with a checkpoint at step 2."""
    work = work_for(tmp_path_factory.mktemp("finished") / "w", saveSteps=2)
    assert work.train() == [0], work.logged()
    return work
