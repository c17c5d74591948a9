"""What the optimizer does with the run file: weight decay, schedules, each optimizer of the API."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.train.models import FAMILIES
from tests.train.worker.runs import FULL, build_engine_in, in_child, work_for


def test_biases_and_norms_do_not_decay_and_all_else_does() -> None:
    found = in_child(_decay_by_family, FAMILIES)
    assert found.keys() == set(FAMILIES)
    for family, (decayed, kept) in found.items():
        assert decayed and kept, family
        assert all(dimensions >= 2 for _, dimensions in decayed), f"{family}: vectors do not decay"
        assert all(dimensions == 1 or "bias" in name for name, dimensions in kept), f"{family}: matrices decay"


def _decay_by_family(families: tuple[str, ...]) -> dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """(decayed, not decayed) parameters by name and number of dimensions, as the engine's optimizer groups them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    from finetune_trainer.worker.engine import Engine
    from tests.train.models import ENCODERS, SEQ2SEQ, tiny_model

    found = {}
    for family in families:
        auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
        auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else auto
        model = auto.from_config(AutoConfig.from_pretrained(tiny_model(family)))
        names = set(Engine.get_decay_parameter_names(None, model))
        shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
        found[family] = (
            [pair for pair in shapes.items() if pair[0] in names],
            [pair for pair in shapes.items() if pair[0] not in names],
        )
    return found


def test_the_optimizer_decays_the_first_group_only(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", **FULL, weightDecay=0.1)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    assert in_child(_dimensions_by_decay, str(work.root)) == {0.1: {2}, 0.0: {1}}


def _dimensions_by_decay(root: str) -> dict[float, set[int]]:
    groups = build_engine_in(root).create_optimizer().param_groups
    return {group["weight_decay"]: {parameter.dim() for parameter in group["params"]} for group in groups}


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


@pytest.mark.parametrize(
    "optimizer", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "Adafactor", "Lion", "Lion8bit", "PagedLion8bit"]
)
def test_each_optimizer_lowers_the_loss(tmp_path: Path, optimizer: str) -> None:
    work = work_for(tmp_path / "w", optimizer=optimizer, totalSteps=6, microBatchSize=4, schedule="Constant")
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
