"""Objectives with a reward: GRPO and PPO."""

from __future__ import annotations

from typing import Any

from tests.train.methods.case import Case, Learning

_WORDS = ("red", "blue", "green", "black", "white", "grey")


def prompts(count: int = 48) -> list[dict[str, str]]:
    """Prompts with the answers that ExactMatch would want."""
    return [{"prompt": f"say {_WORDS[i % 6]} {i // 6}: ", "completion": _WORDS[i % 6]} for i in range(count)]


def reinforcement(kind: str, rewards: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Changes of a run document for objective kind."""
    resolved = {
        "rewards": rewards,
        "beta": 0.02,
        "generations": 4 if kind == "GRPO" else 1,
        "maxNewTokens": 8,
        "temperature": 1.0,
        "clipRange": 0.2,
        "iterations": 1 if kind == "GRPO" else 2,
        **settings,
    }
    return {
        "objective": {"type": kind, "reinforcement": resolved},
        "hyperparameters": {"microBatchSize": 2 if kind == "GRPO" else 8},
    }


LENGTH = {"function": "Length", "targetLength": 8, "weight": 0.25}
VOWELS = {"function": "RegularExpression", "pattern": "([aeiou][^aeiou]*){4}", "weight": 1.0}


def _learns(metric: str, base: float, tuned: float, steps: int) -> Learning:
    changes = {"hyperparameters": {"totalSteps": steps}, "evaluation": {"everySteps": steps}}
    return Learning(metric, base, tuned, changes=changes)


CASES = (
    Case(
        "grpo-lora",
        {"spread": 0.2},
        prompts(),
        reinforcement("GRPO", [VOWELS, LENGTH]),
        learning=_learns("reward", 0.5, 1.0, 40),
    ),
    Case(
        "grpo-full",
        {"spread": 0.2},
        prompts(),
        {**reinforcement("GRPO", [VOWELS], iterations=2), "tuning": {"type": "Full", "lora": None}},
    ),
    Case(
        "ppo-lora",
        {"spread": 0.2},
        prompts(),
        reinforcement("PPO", [VOWELS]),
        learning=_learns("reward", 0.5, 0.9, 60),
    ),
)
