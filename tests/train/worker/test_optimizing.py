"""What the optimizer does with the run file: weight decay, schedules, each optimizer of the API."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.train.models import FAMILIES
from tests.train.worker.runs import FULL, build_engine_in, in_child, work_for


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_do_not_decay(tmp_path: Path, family: str) -> None:
    work = work_for(tmp_path / "w", model={"family": family}, **FULL, weightDecay=0.1)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    decayed, kept = in_child(_dimensions_by_decay, str(work.root))
    assert decayed == {2}, "matrices decay"
    assert kept == {1}, "vectors do not"


def _dimensions_by_decay(root: str) -> tuple[set[int], set[int]]:
    engine = build_engine_in(root)
    groups = {
        group["weight_decay"]: {p.dim() for p in group["params"]} for group in engine.create_optimizer().param_groups
    }
    assert groups.keys() == {0.1, 0.0}
    return groups[0.1], groups[0.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("Constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("Linear", [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("Cosine", [0.0, 0.5, *[(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]]),
        ("CosineToTenth", [0.0, 0.5, *[0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]]),
        ("Polynomial", [0.0, 0.5, *[((6 - step) / 6) ** 2 for step in range(6)]]),
        ("InverseSqrt", [0.0, 0.5, *[math.sqrt(2 / step) for step in range(2, 8)]]),
    ],
)
def test_a_schedule_rises_over_the_warmup_and_then_falls(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    work = work_for(tmp_path / "w", totalSteps=8, schedule=schedule, warmupRatio=0.25, learningRate=0.01)
    assert work.train() == [0], work.logged()
    found = [line["learningRate"] for line in work.metrics() if "loss" in line]
    assert found == pytest.approx([0.01 * factor for factor in expected], abs=1e-9)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "Adafactor", "Lion", "Lion8bit", "PagedLion8bit"])
def test_each_optimizer_lowers_the_loss(tmp_path: Path, optimizer: str) -> None:
    work = work_for(tmp_path / "w", optimizer=optimizer, totalSteps=6, microBatchSize=4, schedule="Constant")
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
