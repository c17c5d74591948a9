"""Preference objectives: DPO, ORPO and KTO."""

from __future__ import annotations

from typing import Any

from tests.train.methods.case import Case, Learning

_WORDS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown")
_MOODS = ("loud", "soft")


def pairs(count: int = 48) -> list[dict[str, str]]:
    """Which of two spellings is preferred depends on the prompt: loud asks for capitals, soft for small letters."""
    rows = []
    for i in range(count):
        word, mood = _WORDS[i % len(_WORDS)], _MOODS[i // len(_WORDS) % 2]
        sides = (word.upper(), word) if mood == "loud" else (word, word.upper())
        prompt = f"say {word} {mood} {i // 16}: "
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows


def judged(count: int = 48) -> list[dict[str, Any]]:
    """The completions of pairs one by one, each with its verdict."""
    rows: list[dict[str, Any]] = []
    for pair in pairs(count // 2):
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    return rows


def preference(kind: str, **settings: Any) -> dict[str, Any]:
    """Changes of a run document for objective kind."""
    return {
        "objective": {"type": kind, "preference": {"beta": 0.1, **settings}},
        "dataset": {"format": "Preference"},
        "hyperparameters": {"microBatchSize": 4},
    }


def _learns(metric: str, base: float, tuned: float, steps: int = 80) -> Learning:
    changes = {"hyperparameters": {"totalSteps": steps}, "evaluation": {"everySteps": steps}}
    return Learning(metric, base, tuned, changes=changes)


CASES = (
    Case("dpo-lora", {"spread": 0.2}, pairs(), preference("DPO"), learning=_learns("rewardAccuracy", 0.6, 0.9)),
    Case(
        "dpo-full",
        {"spread": 0.2},
        pairs(),
        {**preference("DPO", labelSmoothing=0.1), "tuning": {"type": "Full", "lora": None}},
    ),
    Case("orpo-lora", {"spread": 0.2}, pairs(), preference("ORPO"), learning=_learns("rewardAccuracy", 0.7, 0.9, 120)),
    Case(
        "kto-lora",
        {"spread": 0.2},
        judged(96),
        preference("KTO", undesirableWeight=1.1),
        learning=_learns("rewardMargin", 0.01, 0.3),
    ),
)
