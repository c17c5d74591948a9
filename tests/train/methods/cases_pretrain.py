"""Training from random weights, and noised text: the recipes' settings at tiny size."""

from __future__ import annotations

from typing import Any

from tests.train.methods.case import Case, Learning
from tests.train.methods.novel import farm, novel

FULL = {"type": "Full", "lora": None}
SENTINELS = [f"<extra_id_{number}>" for number in range(12)]


def pretrain(kind: str = "Pretrain", **changes: Any) -> dict[str, Any]:
    """The objective; changes name fields of RunPretrain."""
    settings = {
        "tokenizer": "Model",
        "randomWindows": False,
        "blockSize": 64,
        "maskProbability": 0.15,
        "meanSpanLength": 3.0,
        **changes,
    }
    return {"type": kind, "pretrain": settings}


def text_run(task: str, objective: dict[str, Any], **hyperparameters: Any) -> dict[str, Any]:
    """The changes of a run on plain text; blocks of 64 tokens are packed unless windows are drawn."""
    windows = objective["pretrain"]["randomWindows"]
    return {
        "model": {"task": task},
        "dataset": {"format": "Text", "lossOn": "All", "truncation": "Tail"},
        "objective": objective,
        "tuning": FULL,
        "hyperparameters": {
            "packing": not windows,
            "maxSequenceLength": objective["pretrain"]["blockSize"],
            **hyperparameters,
        },
    }


def learning(base: float, tuned: float, steps: int, **hyperparameters: Any) -> Learning:
    """Token accuracy, after steps optimizer steps of a larger batch."""
    settings = {"totalSteps": steps, "microBatchSize": 8, "gradientAccumulation": 1, **hyperparameters}
    return Learning(
        "tokenAccuracy", base, tuned, changes={"hyperparameters": settings, "evaluation": {"everySteps": steps}}
    )


# The recipe has batch 64, blocks of 256, width 384, 6 heads and layers, 5,000 steps; the rest is its own.
CHARACTER = text_run(
    "CausalLM",
    pretrain(tokenizer="Character", randomWindows=True),
    learningRate=3e-4,
    microBatchSize=8,
    gradientAccumulation=1,
) | {"dataset": {"format": "Text", "lossOn": "All", "truncation": "Tail", "validationFraction": 0.1}}

CASES = (
    Case(
        "pretrain-character",
        {"family": "gpt2", "dropout": 0.2},
        novel(),
        CHARACTER,
        learning=learning(0.1, 0.45, 250, learningRate=1e-2),
    ),
    Case(
        "pretrain-byte-pairs",
        {"family": "llama"},
        novel(),
        text_run("CausalLM", pretrain(tokenizer="BytePair", vocabularySize=320)),
        learning=learning(0.1, 0.7, 150),
    ),
    Case(
        "pretrain-masked",
        {"family": "bert", "tied": True},
        farm(96),
        text_run("MaskedLM", pretrain(tokenizer="BytePair", vocabularySize=320), packing=False),
        learning=learning(0.1, 0.4, 300),
    ),
    # Rotary positions: with learned ones a tiny model needs far more steps in blocks (docs/numerics.md).
    Case(
        "pretrain-masked-packed",
        {"family": "modernbert", "tied": True},
        farm(96),
        text_run("MaskedLM", pretrain(tokenizer="BytePair", vocabularySize=320, blockSize=32)),
        learning=learning(0.1, 0.3, 1000, learningRate=5e-3, warmupRatio=0.1),
    ),
    Case(
        "masked-text",
        {"family": "bert", "tied": True},
        farm(),
        text_run("MaskedLM", pretrain("Supervised"), packing=False),
        learning=learning(0.1, 0.45, 300),
    ),
    # The recipe has FP16 and records of 256 tokens on switch-base-8, whose tokenizer has its sentinels.
    Case(
        "span-corruption-switch",
        {"family": "switch_transformers"},
        farm(),
        text_run("Seq2Seq", pretrain("Supervised"), packing=False, microBatchSize=8, gradientAccumulation=1)
        | {"model": {"task": "Seq2Seq", "addSpecialTokens": SENTINELS}},
        learning=learning(0.1, 0.4, 300),
    ),
    Case(
        "pretrain-span-corruption",
        {"family": "t5"},
        farm(96),
        text_run("Seq2Seq", pretrain(tokenizer="BytePair", vocabularySize=400, blockSize=32)),
        learning=learning(0.1, 0.45, 250, learningRate=3e-3),
    ),
)
