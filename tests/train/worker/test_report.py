"""The report as a document: any objective's figures, predictions, curves, sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.train.worker.runs import in_child

HISTORY = [
    {"step": 0, "evalLoss": 0.7, "evalRewardMargin": 0.0},
    {"step": 1, "loss": 0.69, "rewardMargin": 0.1, "gradNorm": 1.0, "learningRate": 1e-3, "tokensPerSecond": 10.0},
    {"step": 2, "loss": 0.5, "rewardMargin": 0.6, "gradNorm": 0.5, "learningRate": 5e-4, "tokensPerSecond": 12.0},
    {"step": 2, "evalLoss": 0.4, "evalRewardMargin": 0.9},
]


def test_each_figure_of_an_objective_gets_a_curve(tmp_path: Path) -> None:
    drawn = in_child(_draw, HISTORY, str(tmp_path))
    assert [title for title, _ in drawn] == [
        "Loss",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens per second",
        "rewardMargin",
    ]
    for _, file in drawn:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_history_has_no_curve(tmp_path: Path) -> None:
    assert in_child(_draw, [], str(tmp_path)) == []


def _draw(history: list[dict[str, Any]], folder: str) -> list[tuple[str, str]]:
    from finetune_trainer.worker.curves import draw_curves

    return draw_curves(history, Path(folder))


def test_a_line_of_metrics_has_the_names_of_the_report() -> None:
    entry = {
        "step": 3,
        "epoch": 1.0,
        "loss": 2.0,
        "grad_norm": float("inf"),
        "learning_rate": 0.1,
        "tokens_per_second": 7.0,
        "rewardMargin": 0.5,
    }
    evaluation = {"step": 3, "eval_loss": 1.0, "eval_tokenAccuracy": 0.5, "eval_runtime": 3.0}
    assert in_child(_lines, [entry, evaluation, {"train_runtime": 1.0}]) == [
        {"step": 3, "epoch": 1.0, "loss": 2.0, "learningRate": 0.1, "tokensPerSecond": 7.0, "rewardMargin": 0.5},
        {"step": 3, "evalLoss": 1.0, "evalTokenAccuracy": 0.5},
        None,
    ]


def _lines(entries: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    from finetune_trainer.worker.report import metrics_line

    return [metrics_line(entry) for entry in entries]


def test_predicted_classes_stand_side_by_side_with_their_probabilities() -> None:
    base = {"prompt": "fine", "label": "good", "prediction": "bad", "probabilities": {"good": 0.4, "bad": 0.6}}
    tuned = {**base, "prediction": "good", "probabilities": {"good": 0.9, "bad": 0.1}}
    assert in_child(_predictions, [base], [tuned]) == [
        {
            "prompt": "fine",
            "label": "good",
            "base": "bad",
            "tuned": "good",
            "baseProbabilities": {"good": 0.4, "bad": 0.6},
            "tunedProbabilities": {"good": 0.9, "bad": 0.1},
        }
    ]


def test_rewards_of_pairs_stand_side_by_side() -> None:
    base = {"prompt": "q", "chosenReward": 0.0, "rejectedReward": 0.1}
    assert in_child(_predictions, [base], [{**base, "chosenReward": 2.0}]) == [
        {
            "prompt": "q",
            "baseChosenReward": 0.0,
            "tunedChosenReward": 2.0,
            "baseRejectedReward": 0.1,
            "tunedRejectedReward": 0.1,
        }
    ]


def _predictions(base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from finetune_trainer.worker.report import prediction_lines

    outcome: Any = SimpleNamespace(base=SimpleNamespace(predictions=base), tuned=SimpleNamespace(predictions=tuned))
    return prediction_lines(outcome)


@pytest.mark.parametrize(("before", "after", "percent"), [(2.0, 1.0, -50.0), (-2.0, -1.0, 50.0), (0.0, 1.0, None)])
def test_a_change_is_told_in_percent_of_the_base(before: float, after: float, percent: float | None) -> None:
    assert in_child(_change, before, after) == percent


def _change(before: float, after: float) -> float | None:
    from finetune_trainer.worker.report import change_percent

    return change_percent(before, after)


def test_data_in_a_report_cannot_break_out_of_its_table() -> None:
    from finetune_trainer.worker.report_text import render_report

    text = render_report(_report({"prompt": "a|b\n<script>", "reference": "", "base": "x", "tuned": "y"}), [])
    assert "| a\\|b<br>&lt;script> | (empty) | x | y |" in text
    assert "It stopped early, before step 9." in text
    assert "Published is step 3, the best by accuracy." in text
    assert "(1.5 KiB)" in text
    assert "planned micro batch of 8: the run went on with 2, and gradients accumulated over 12 passes" in text
    assert "| LossSpike | 1,234 | 1,224 | 1,254 | 0.25 |" in text
    assert "| f1 (macro mean) | 0.2000 | 0.4000 | +100.0 % |" in text
    assert "generation.maxNewTokens: answers end after 64 tokens." in text


def _report(answer: dict[str, str]) -> dict[str, Any]:
    return {
        "job": {"namespace": "team-a", "name": "faq"},
        "modelId": "team-a/faq-0f1e2d3c4b5a",
        "artifact": "adapter",
        "artifactBytes": 1536,
        "merged": False,
        "task": "SequenceClassification",
        "lineage": {
            "baseModel": "hf://a/b",
            "baseModelRevision": None,
            "baseModelDigest": "d",
            "adapter": None,
            "adapterDigest": None,
            "datasets": ["s3://b/x"],
            "validation": None,
            "test": None,
            "datasetDigest": "e",
            "runFileDigest": "f",
            "libraries": {"torch": "2"},
        },
        "settings": [],
        "objective": {"type": "Supervised"},
        "tuning": {"type": "LoRA"},
        "features": {"off": {}},
        "data": {"trainRecords": 5},
        "parameters": {"total": 100, "trainable": 5, "trainableShare": 0.05},
        "training": {
            "steps": 5,
            "plannedSteps": 9,
            "stoppedEarly": True,
            "publishedStep": 3,
            "bestMetric": "accuracy",
            "globalBatchSize": 1,
            "processes": 1,
            "tokens": 7,
            "seconds": 1.0,
            "tokensPerSecond": 7.0,
            "flops": 4200,
            "flopsFormula": "(4 N + 2 T) D",
            "peakGpuMemoryGiB": 7.5,
        },
        "hyperparameters": {"microBatchSize": 8},
        "guards": {
            "microBatchSize": 2,
            "gradientAccumulation": 12,
            "rollbacks": [
                {"reason": "LossSpike", "onsetStep": 1234, "toStep": 1224, "untilStep": 1254, "factor": 0.25},
            ],
        },
        "evaluation": {
            "records": 2,
            "on": "test",
            "base": {"f1": 0.2},
            "tuned": {"f1": 0.4},
            "changePercent": {"f1": 100.0},
            "notes": {"f1": "macro mean", "generation.maxNewTokens": "answers end after 64 tokens"},
            "requirements": [],
        },
        "answers": [answer],
        "probes": [],
    }
