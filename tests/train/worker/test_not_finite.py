"""Figures that are not finite behind a loss that is: each ends the run with its own words, and nothing is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import FULL, build_engine_in, in_child, work_for


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each fault of one engine ended in."""
    work = work_for(tmp_path_factory.mktemp("not-finite") / "w", **FULL, totalSteps=40, saveSteps=1)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return in_child(_faults, str(work.root))


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_ends_the_run(found: dict[str, Any]) -> None:
    assert found["gradient"] == {
        "class": "NonFiniteLoss",
        "reason": "NonFiniteLoss",
        "onset": 1,
        "field": "spec.hyperparameters.learningRate",
        "message": "The gradient of step 1 is not finite. Lower hyperparameters.learningRate.",
    }
    assert found["lossIsFinite"]
    assert found["weightsUnchanged"]
    assert found["saved"] == []


def test_a_scaler_that_skips_more_than_20_steps_in_a_row_ends_the_run(found: dict[str, Any]) -> None:
    assert found["skippedTwenty"] == 20, "twenty skipped steps end nothing"
    assert found["afterAStep"] == 0, "a step that was made begins the count anew"
    alarm = found["skipped"]
    assert (alarm["class"], alarm["field"]) == ("NonFiniteLoss", "spec.hyperparameters.precision")
    assert alarm["onset"] == 31, "the first of the 21 steps 31 to 51"
    assert alarm["message"].startswith("21 steps in a row, up to step 51, had a gradient too large for FP16.")


def test_a_held_out_loss_that_is_not_finite_ends_the_run(found: dict[str, Any]) -> None:
    assert found["heldOut"]["class"] == "NonFiniteLoss"
    assert found["heldOut"]["message"].startswith("The held-out loss at step 7 is not finite.")


def _faults(root: str) -> dict[str, Any]:
    engine = build_engine_in(root)
    return {
        **_broken_gradient(engine),
        **_skipped_steps(engine),
        "heldOut": _broken_evaluation(engine),
        "saved": [path.name for path in Path(root, "checkpoints").glob("*.ready")],
    }


def _error_of(function: Any, *arguments: Any) -> dict[str, Any]:
    """What function ends in, or what it returned."""
    from finetune_api.failures import FinetuneError

    try:
        return {"returned": str(function(*arguments))}
    except FinetuneError as error:
        told = {"class": error.failure_class, "field": error.field, "message": str(error)}
        if hasattr(error, "onset_step"):
            told |= {"onset": error.onset_step, "reason": str(error.reason)}
        return told


def _broken_gradient(engine: Any) -> dict[str, Any]:
    """A training whose first step has an infinite gradient at one weight."""
    from math import isfinite

    import torch

    losses: list[float] = []
    plain = engine.compute_loss

    def noted(*arguments: Any, **options: Any) -> Any:
        loss = plain(*arguments, **options)
        losses.append(float(loss))
        return loss

    engine.compute_loss = noted
    weight = engine.model.model.norm.weight
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    found = _error_of(engine.train)
    hook.remove()
    after = engine.model.state_dict()
    return {
        "gradient": found,
        "lossIsFinite": bool(losses) and all(map(isfinite, losses)),
        "weightsUnchanged": all(torch.equal(before[name], after[name]) for name in before),
    }


def _skipped_steps(engine: Any) -> dict[str, Any]:
    """Steps at whose boundary the accelerator says that the scaler skipped them: 20, one that was made, and 21."""
    from types import SimpleNamespace

    from finetune_trainer.worker.train import boundary_of

    boundary, carry = boundary_of(engine), engine.supervision.carry
    accelerator = SimpleNamespace(optimizer_step_was_skipped=True)
    boundary.engine = SimpleNamespace(
        accelerator=accelerator,
        agreement=engine.agreement,
        checkpoints=engine.checkpoints,
        supervision=engine.supervision,
    )

    def step(number: int) -> None:
        state = SimpleNamespace(global_step=number)
        boundary.on_step_end(engine.args, state, SimpleNamespace())

    for number in range(1, 21):
        step(number)
    found: dict[str, Any] = {"skippedTwenty": carry.skipped_steps}
    accelerator.optimizer_step_was_skipped = False
    for number in range(21, 31):
        step(number)
    found["afterAStep"] = carry.skipped_steps
    accelerator.optimizer_step_was_skipped = True
    for number in range(31, 51):
        step(number)
    found["skipped"] = _error_of(step, 51)
    boundary.engine = engine
    return found


def _broken_evaluation(engine: Any) -> dict[str, Any]:
    """An evaluation after step 7 of a model with a weight that is not finite."""
    engine.state.global_step = 7
    engine.model.model.norm.weight.data[3] = float("nan")
    return _error_of(engine.evaluate)
