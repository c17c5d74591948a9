"""An interrupted run equals an uninterrupted one, step by step and to the bit (CPU)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import FULL, LORA, QLORA, Work, in_child, plant_pickle, work_for

# 19 training records in steps of 4: five steps an epoch, so that step 3 and step 8 lie in the middle of one.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": {**LORA, "dropout": 0.2}},
    "Full": {**FULL, "optimizer": "AdamW"},
    # rank 64 gives tensors large enough for states of 8 bits
    "QLoRA": {**QLORA, "lora": {**LORA, "rank": 64, "dropout": 0.2}, "gradientCheckpointing": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path: Path, method: str) -> None:
    whole = work_for(
        tmp_path / "whole", model={"width": 64}, **METHODS[method], totalSteps=8, saveSteps=3, warmupRatio=0.25
    )
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 3, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()

    last = "checkpoints/step-8"
    assert resumed.losses(last) == whole.losses(last), "losses and gradient norms, the first three carried over"
    assert [step for step, _, _ in resumed.losses(last)] == list(range(1, 9))
    assert in_child(_same_weights, str(whole.root), str(resumed.root))
    assert resumed.read("state/progress.json")["resumedFromStep"] == 3
    first, second = whole.read("artifact/report.json"), resumed.read("artifact/report.json")
    assert second["evaluation"] == first["evaluation"], "the base's loss travels in the checkpoint"
    assert second["answers"] == first["answers"]
    assert second["training"]["tokens"] == first["training"]["tokens"]


def _same_weights(first: str, second: str) -> bool:
    import torch
    from safetensors.torch import load_file

    found = []
    for root in (first, second):
        artifact = Path(root) / "artifact"
        found.append(load_file(next(p for p in artifact.glob("*/*.safetensors"))))
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


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


@pytest.mark.parametrize("planted", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_is_refused_and_never_runs(finished: Work, tmp_path: Path, planted: str) -> None:
    resumed = finished.resumed_from(finished, 2, tmp_path / "resumed")
    in_child(plant_pickle, str(resumed.root / "resume" / planted), "state", str(tmp_path / "was-run"))
    assert resumed.train() == [89], resumed.logged()
    assert resumed.read("state/error-0.json")["class"] == "UnsafeFile"
    assert not (tmp_path / "was-run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A finished run with a checkpoint at step 2."""
    work = work_for(tmp_path_factory.mktemp("finished") / "w", saveSteps=2)
    assert work.train() == [0], work.logged()
    return work
