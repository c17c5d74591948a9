"""Classifiers, taggers, sequence-to-sequence models and reward models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tests.train.methods.case import Case, Learning, Row, merged
from tests.train.worker.runs import NF4

_FULL: Mapping[str, Any] = {"tuning": {"type": "Full", "lora": None}, "hyperparameters": {"learningRate": 3e-3}}
_QLORA: Mapping[str, Any] = {
    "tuning": {"type": "QLoRA", "quantization": NF4},
    "hyperparameters": {"precision": "BF16", "optimizer": "PagedAdamW8bit"},
}


def _steps(count: int, **more: Any) -> Mapping[str, Any]:
    hyperparameters = {"totalSteps": count, "microBatchSize": 8, "gradientAccumulation": 1, **more}
    return {"hyperparameters": hyperparameters, "evaluation": {"everySteps": count}}


def labelled(count: int = 120) -> list[Row]:
    """A word in the text tells the label; the texts are of very different lengths."""
    words = {"positive": ("lovely", "great"), "negative": ("awful", "poor")}
    rows: list[Row] = []
    for number in range(count):
        label = ("negative", "positive")[number % 2]
        word = words[label][number // 2 % 2]
        rows.append(
            {"text": f"{'a film ' * (number % 5)}{word}{' again' * (number % 3)} {number % 10}", "label": label}
        )
    return rows


def tagged(count: int = 96) -> list[Row]:
    """Entities between other words, all of them single tokens of the tiny tokenizer but at a record's start.

    `capital` begins an entity or goes on with one, `m` goes on with one or is none: the word before tells.
    """
    entities = ((("Answer",), "PER"), (("Answer", "m"), "PER"), (("capital",), "LOC"), (("tiny", "capital"), "LOC"))
    others = ("is", "of", "the", "a", "m", "w", "c")
    draw = random.Random(5)
    rows: list[Row] = []
    for _ in range(count):
        words, tags = ["a"], ["O"]
        for _ in range(draw.randrange(1, 5)):
            entity, kind = draw.choice(entities)
            between = [draw.choice(others[:4]), *draw.choices(others, k=draw.randrange(3))]
            words += [*entity, *between]
            tags += [f"B-{kind}", *[f"I-{kind}"] * (len(entity) - 1), *["O"] * len(between)]
        rows.append({"tokens": words, "tags": tags})
    return rows


def translated(count: int = 48) -> list[Row]:
    """Each colour has one word for it; a number in front is only noise."""
    words = {"red": "rot", "blue": "blau", "green": "gruen und hell", "black": "schwarz"}
    return [
        {"prompt": f"{'please ' * (number % 3)}say {colour} {number}", "completion": words[colour]}
        for number, colour in ((n, list(words)[n % 4]) for n in range(count))
    ]


def preferred(count: int = 48) -> list[Row]:
    """The polite answer is preferred, long or short."""
    polite, rude = ("Gladly, thank you.", "With pleasure, here you are."), ("No.", "Go away, I am busy now.")
    return [
        {
            "prompt": f"Task {n}: ",
            "chosen": polite[n % 2] + " Yes" * (n % 4),
            "rejected": rude[n // 2 % 2] + "!" * (n % 5),
        }
        for n in range(count)
    ]


def _task(task: str, objective: str = "Supervised", **dataset: Any) -> Mapping[str, Any]:
    return {
        "model": {"task": task},
        "objective": {"type": objective},
        "dataset": {"validationFraction": 0.4, **dataset},
    }


CLASSES = _task("SequenceClassification", format="Labels")
WORDS = _task("TokenClassification", format="Tags")
TARGETS = _task("Seq2Seq", maxSourceTokens=48, maxTargetTokens=32)
PAIRS = _task("SequenceClassification", "Reward", format="Preference")

CASES = (
    Case(
        "classification-full",
        {"family": "bert", "spread": 0.1},
        labelled(),
        merged(CLASSES, _FULL),
        learning=Learning("accuracy", 0.75, 0.95, changes=_steps(80)),
    ),
    Case(
        "classification-lora",
        {"family": "llama", "spread": 0.2},
        labelled(),
        CLASSES,
        learning=Learning("accuracy", 0.75, 0.95, changes=_steps(80)),
    ),
    Case("classification-qlora", {"family": "llama", "spread": 0.2, "width": 64}, labelled(), merged(CLASSES, _QLORA)),
    Case(
        "tagging-full",
        {"family": "bert", "spread": 0.1},
        tagged(),
        merged(WORDS, _FULL),
        learning=Learning("f1", 0.3, 0.9, changes=_steps(160), rows=tagged(240)),
    ),
    Case(
        "tagging-lora",
        {"family": "llama", "spread": 0.2},
        tagged(),
        WORDS,
        learning=Learning("f1", 0.3, 0.95, changes=_steps(120)),
    ),
    Case(
        "seq2seq-full",
        {"family": "t5", "spread": 0.02},
        translated(),
        merged(TARGETS, _FULL),
        learning=Learning("tokenAccuracy", 0.2, 0.9, changes=_steps(120)),
    ),
    Case(
        "seq2seq-lora",
        {"family": "t5", "spread": 0.02},
        translated(),
        TARGETS,
    ),
    Case(
        "seq2seq-switch",
        {"family": "switch_transformers", "spread": 0.02},
        translated(),
        merged(TARGETS, _FULL),
        learning=Learning("tokenAccuracy", 0.2, 0.9, changes=_steps(120)),
    ),
    Case(
        "reward-full",
        {"family": "llama", "spread": 0.1},
        preferred(),
        merged(PAIRS, _FULL),
        learning=Learning("rewardMargin", 1.0, 4.0, changes=_steps(40)),
    ),
    Case(
        "reward-lora",
        {"family": "llama", "spread": 0.2},
        preferred(),
        PAIRS,
        learning=Learning("rewardMargin", 1.0, 4.0, changes=_steps(40)),
    ),
)
