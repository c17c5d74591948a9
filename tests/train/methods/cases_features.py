"""Training features that change the curve: noise on embeddings, optimizers, schedules, clipping, the best model."""

from __future__ import annotations

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import records

_FULL = {"type": "Full", "lora": None}
_HELD_OUT = [{"prompt": f"say {word}: ", "completion": word} for word in ("red", "blue", "green", "black")]
_CONTRARY = [{"prompt": row["prompt"], "completion": row["completion"][::-1]} for row in _HELD_OUT] * 6

CASES = (
    Case(
        "features-neftune",
        {"spread": 0.2},
        records(),
        {
            "tuning": _FULL,
            "hyperparameters": {
                "neftuneAlpha": 5.0,
                "schedule": "CosineToTenth",
                "warmupRatio": 0.25,
                "learningRate": 3e-3,
            },
        },
        learning=Learning(
            "loss",
            4.0,
            2.0,
            higher=False,
            changes={"hyperparameters": {"totalSteps": 80, "microBatchSize": 4}},
        ),
    ),
    Case(
        "features-lion",
        {"spread": 0.2},
        records(),
        {
            "tuning": _FULL,
            "hyperparameters": {
                "optimizer": "Lion8bit",
                "schedule": "Polynomial",
                "learningRate": 1e-3,
                "weightDecay": 0.1,
                "maxGradNorm": 0.5,
            },
        },
        learning=Learning(
            "loss",
            4.0,
            2.0,
            higher=False,
            changes={"hyperparameters": {"totalSteps": 160, "microBatchSize": 4}},
        ),
    ),
    Case(
        "features-early-stopping",
        {"spread": 0.2, "width": 64},
        _CONTRARY,
        {
            "dataset": {"validationFraction": None, "validation": {"uri": "s3://b/v.jsonl", "access": {}}},
            "hyperparameters": {
                "totalSteps": 6,
                "schedule": "InverseSqrt",
                "earlyStopping": {"patience": 2, "minDelta": 0.0},
            },
            "evaluation": {"everySteps": 1},
        },
        folders={"validation": _HELD_OUT},
    ),
)
