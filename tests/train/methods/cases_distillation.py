"""Distillation: the recipe gpt2-medium → gpt2 on sentiment at tiny size, as causal models and as classifiers."""

from __future__ import annotations

from tests.train.methods.case import Case, Learning
from tests.train.worker.runs import records

FULL = {"type": "Full", "lora": None}
TEACHER = {"family": "gpt2", "width": 48, "layers": 3, "spread": 0.2, "seed": 1}
# The teacher's names are those of the data, in another order: its classes are found by name.
CLASSIFIER_TEACHER = {**TEACHER, "labels": ("positive", "negative"), "positions": 256}
STUDENT = {"family": "gpt2", "spread": 0.05}


def distillation(**changes: object) -> dict[str, object]:
    """The objective with the recipe's alpha and temperature."""
    settings = {
        "teacher": {"uri": "hf://tiny/gpt2-medium", "access": {}},
        "teacherDigest": "sha256:t",
        "temperature": 4.0,
        "alpha": 0.5,
        "quantizeTeacher": False,
        **changes,
    }
    return {"type": "Distillation", "distillation": settings}


GOOD = ("fine", "bright", "warm", "clever", "lovely")
BAD = ("dull", "cold", "loud", "empty", "awful")
SENTIMENT = [
    {"text": f"a {word} film, {other} and {word}", "label": label}
    for label, words in (("positive", GOOD), ("negative", BAD))
    for word in words
    for other in words
]
# The recipe's own settings; one rank, so that the batch is one record.
RECIPE = {
    "learningRate": 6e-5,
    "microBatchSize": 1,
    "gradientAccumulation": 1,
    "maxSequenceLength": 256,
    "seed": 8855,
}
CLASSIFICATION = {
    "model": {"task": "SequenceClassification"},
    "dataset": {"format": "Labels"},
    "objective": distillation(),
    "tuning": FULL,
    "hyperparameters": RECIPE,
    "checkpoint": {"keepLast": 2},
}

CASES = (
    Case(
        "distillation",
        STUDENT,
        records(),
        {"objective": distillation(), "tuning": FULL},
        models={"teacher": TEACHER},
        learning=Learning(
            "divergence",
            0.05,
            0.02,
            higher=False,
            changes={
                "objective": distillation(alpha=0.0),
                "hyperparameters": {"totalSteps": 120},
                "evaluation": {"everySteps": 120},
            },
        ),
    ),
    Case(
        "distillation-classifier",
        {**STUDENT, "positions": 256},
        SENTIMENT,
        CLASSIFICATION,
        models={"teacher": CLASSIFIER_TEACHER},
        learning=Learning(
            "accuracy",
            0.75,
            0.9,
            changes={
                "objective": distillation(alpha=0.9),
                "hyperparameters": {"totalSteps": 150, "microBatchSize": 8, "learningRate": 3e-3},
                "evaluation": {"everySteps": 150},
            },
        ),
    ),
)
