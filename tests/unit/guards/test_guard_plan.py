"""spec.guards: what is chosen, why, and that a given value wins."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.planner.ledger import SET_BY_JOB
from finetune_api.runfile import RunGuards
from tests.unit.api import values


def planned(**changes: Any) -> tuple[RunGuards, dict[str, str]]:
    """The guards of the run, and the reason of each setting."""
    found = values.plan(values.spec(**changes), model=values.small_model())
    return found.run.guards, {item.name: item.reason for item in found.plan.settings}


@pytest.mark.parametrize(("steps", "back"), [(100, 10), (300, 15), (100_000, 100)])
def test_the_loss_is_guarded_and_a_rollback_is_a_twentieth_of_the_run(steps: int, back: int) -> None:
    guards, reasons = planned(hyperparameters={"maxSteps": steps})
    assert (guards.loss_spike, guards.rollback_steps, guards.lowered_steps) == ("Rollback", back, 2 * back)
    assert (guards.rate_factor, guards.window, guards.spike_steps) == (0.5, 64, 8)
    assert "lower learning rate" in reasons["guards.lossSpike"]


def test_too_few_steps_are_not_guarded() -> None:
    guards, reasons = planned(hyperparameters={"maxSteps": 99})
    assert guards == RunGuards()
    assert reasons["guards.lossSpike"] == "99 steps are too few to tell a spike from noise"


@pytest.mark.parametrize("kind", ["PPO", "GRPO"])
def test_the_loss_of_a_policy_is_not_guarded(kind: str) -> None:
    guards, reasons = planned(**values.OBJECTIVES[kind], hyperparameters={"maxSteps": 1000})
    assert guards.loss_spike == "Off"
    assert "policy" in reasons["guards.lossSpike"]


def test_an_evaluation_has_nothing_to_guard() -> None:
    guards, reasons = planned(**values.OBJECTIVES["Evaluation"])
    assert guards == RunGuards()
    assert "guards.lossSpike" not in reasons


def test_what_the_job_sets_wins() -> None:
    off, reasons = planned(hyperparameters={"maxSteps": 1000}, guards={"lossSpike": "Off"})
    assert (off.loss_spike, reasons["guards.lossSpike"]) == ("Off", SET_BY_JOB)
    short, reasons = planned(hyperparameters={"maxSteps": 50}, guards={"rollbackSteps": 7})
    assert (short.loss_spike, short.rollback_steps, short.lowered_steps) == ("Rollback", 7, 14)
    assert reasons["guards.lossSpike"] == "guards.rollbackSteps asks for it"
    assert reasons["guards.rollbackSteps"] == SET_BY_JOB
