"""How data is laid out: packed, grouped by length, conversations."""

from __future__ import annotations

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import records

_CHATS = [
    {
        "conversations": [
            {"from": "human", "value": f"say {word}"},
            {"from": "gpt", "value": word},
            {"from": "human", "value": "again"},
            {"from": "gpt", "value": f"{word} {word}"},
        ]
    }
    for word in ("red", "blue", "green", "black", "white", "grey", "pink", "gold") * 2
]
_FULL = {"type": "Full", "lora": None}
_SKEWED = [{"text": f"{word} {k}", "label": word[0]} for k in range(12) for word in ("red", *["blue"] * (k % 3))]
_LEARNS = Learning(
    "loss",
    4.0,
    2.0,
    higher=False,
    changes={"hyperparameters": {"totalSteps": 60, "microBatchSize": 2}, "evaluation": {"everySteps": 60}},
)

CASES = (
    Case(
        "supervised-packed",
        {"spread": 0.2},
        records(48),
        {"tuning": _FULL, "hyperparameters": {"packing": True, "maxSequenceLength": 96}},
        learning=_LEARNS,
    ),
    Case(
        "supervised-packed-float-mask",
        {"family": "opt", "spread": 0.2},
        records(48),
        {"tuning": _FULL, "hyperparameters": {"packing": True, "maxSequenceLength": 96}},
    ),
    Case(
        "supervised-grouped-by-length",
        {"spread": 0.2},
        records(),
        {"tuning": _FULL, "hyperparameters": {"groupByLength": True}},
    ),
    Case(
        "supervised-share-gpt",
        {"spread": 0.2, "chat_template": True},
        _CHATS,
        {"tuning": _FULL, "dataset": {"format": "ShareGPT"}, "hyperparameters": {"maxSequenceLength": 128}},
    ),
    Case(
        "classification-balanced",
        {"family": "bert", "spread": 0.2},
        _SKEWED,
        {
            "model": {"task": "SequenceClassification"},
            "dataset": {"format": "Labels", "balanceLabels": True},
            "tuning": _FULL,
        },
    ),
)
