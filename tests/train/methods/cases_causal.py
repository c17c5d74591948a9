"""Supervised fine-tuning of causal models."""

from __future__ import annotations

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import NF4, records

_LEARNS = Learning(
    "loss",
    4.0,
    2.0,
    higher=False,
    changes={"hyperparameters": {"totalSteps": 120, "microBatchSize": 4}, "evaluation": {"everySteps": 120}},
)

CASES = (
    Case(
        "supervised-full",
        {"spread": 0.2},
        records(),
        {"tuning": {"type": "Full", "lora": None}},
        learning=_LEARNS,
    ),
    Case("supervised-lora", {"spread": 0.2}, records(), {}, learning=_LEARNS),
    Case(
        "supervised-qlora",
        {"spread": 0.2},
        records(),
        {
            "tuning": {"type": "QLoRA", "quantization": NF4},
            "hyperparameters": {"precision": "BF16", "optimizer": "PagedAdamW8bit"},
        },
        learning=_LEARNS,
    ),
)
