"""The reward objective against its formula and against TRL's trainer on the same batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case, merged
from tests.train.methods.cases_tasks import PAIRS, preferred
from tests.train.worker.runs import build_engine_in, in_child

FULL = {"tuning": {"type": "Full", "lora": None}, "dataset": {"validationFraction": 0.5}}
CASE = Case("", {"family": "llama", "spread": 0.2}, preferred(16), merged(PAIRS, FULL))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = CASE.work(tmp_path_factory.mktemp("reward") / "run")
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return in_child(_measured, str(work.root), str(work.root / "trl"))


def _measured(root: str, scratch: str) -> dict[str, Any]:
    import torch
    from trl import RewardConfig, RewardTrainer

    engine = build_engine_in(root)
    objective, model = engine.objective, engine.model
    items = list(engine._held_out)
    batch = objective.collate(items)
    model.eval()
    with torch.no_grad():
        total = float(objective.loss_sum(model, batch).total)
        sums = {name: pair.tolist() for name, pair in objective.measure(model, batch).items()}
        predictions = objective.predict(model, batch)
        empty = objective.collate([])
        nothing = (
            float(objective.loss_sum(model, empty).total),
            int(objective.units(empty)),
            objective.predict(model, empty),
        )

        # TRL's loss is a method of its trainer; it is called on a bare one, for making a whole one needs a data set.
        trainer = RewardTrainer.__new__(RewardTrainer)
        trainer.model, trainer.accelerator = model, engine.accelerator
        trainer.args = RewardConfig(output_dir=scratch, center_rewards_coefficient=None, use_cpu=True, report_to=[])
        trainer._metrics = {"train": _Lists(), "eval": _Lists()}
        trainer._total_train_tokens, trainer._tp_size = 0, 1
        inputs = {name: value for name, value in batch.items() if name != "counted"}
        theirs = float(RewardTrainer.compute_loss(trainer, model, inputs))
    scored = {"margin": trainer._metrics["eval"]["margin"][0], "accuracy": trainer._metrics["eval"]["accuracy"][0]}
    return {
        "total": total,
        "sums": sums,
        "predictions": predictions,
        "nothing": nothing,
        "trl": theirs,
        "trl metrics": scored,
        "lengths": [(len(item.chosen_ids), len(item.rejected_ids)) for item in items],
        "ends": {int(ids[-1]) for item in items for ids in (item.chosen_ids, item.rejected_ids)},
        "eos": engine.objective.tokenizer.eos_token_id,
    }


class _Lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


def test_the_loss_is_minus_the_log_of_the_sigmoid_of_the_margin(measured: dict[str, Any]) -> None:
    pairs = [(p["chosenReward"], p["rejectedReward"]) for p in measured["predictions"]]
    assert len(pairs) == len(measured["lengths"]) == 8
    assert len(set(measured["lengths"])) > 4, "pairs of unequal lengths, so that padding matters"
    expected = sum(math.log1p(math.exp(rejected - chosen)) for chosen, rejected in pairs)
    assert measured["total"] == pytest.approx(expected, rel=1e-5)
    assert measured["sums"]["loss"] == pytest.approx([expected, 8], rel=1e-5)
    assert measured["sums"]["rewardMargin"] == pytest.approx([sum(c - r for c, r in pairs), 8], rel=1e-5)
    assert measured["sums"]["accuracy"] == [sum(c > r for c, r in pairs), 8]


def test_the_loss_margin_and_accuracy_are_those_of_trl(measured: dict[str, Any]) -> None:
    assert measured["total"] / 8 == pytest.approx(measured["trl"], rel=1e-5)
    margin, pairs = measured["sums"]["rewardMargin"]
    assert margin / pairs == pytest.approx(measured["trl metrics"]["margin"], rel=1e-5)
    assert measured["sums"]["accuracy"][0] / pairs == pytest.approx(measured["trl metrics"]["accuracy"])


def test_the_score_stands_at_the_end_token(measured: dict[str, Any]) -> None:
    assert measured["ends"] == {measured["eos"]}


def test_a_rank_without_pairs_adds_nothing(measured: dict[str, Any]) -> None:
    assert measured["nothing"] == (0.0, 0, [])


def test_padding_never_moves_the_score(tmp_path: Path) -> None:
    work = CASE.work(tmp_path / "run")
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    alone, together = in_child(_scores, str(work.root))
    assert together == pytest.approx(alone, abs=1e-5)


def _scores(root: str) -> tuple[list[float], list[float]]:
    """Scores of each completion by itself, and of all in one batch."""
    import torch

    engine = build_engine_in(root)
    objective, model = engine.objective, engine.model.eval()
    items = list(engine._held_out)
    with torch.no_grad():
        alone = []
        for item in items:
            for ids in (item.chosen_ids, item.rejected_ids):
                alone.append(float(model(input_ids=torch.from_numpy(ids.astype("int64"))[None]).logits[0, 0]))
        rows = objective.predict(model, objective.collate(items))
    return alone, [value for row in rows for value in (row["chosenReward"], row["rejectedReward"])]
