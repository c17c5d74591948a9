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
VOWELS = {"function": "RegularExpression", "pattern": "([aeiou][^aeiou]*){2}", "weight": 1.0}
HELD_OUT = {"dataset": {"validationFraction": 0.3}}


def _learns(steps: int, micro: int, **settings: Any) -> Learning:
    """The share of sampled answers with two vowels; about 0.43 of the untuned model's have them."""
    changes = {
        "objective": {"reinforcement": {"rewards": [VOWELS], "beta": 0.005, **settings}},
        "hyperparameters": {"totalSteps": steps, "microBatchSize": micro, "learningRate": 2e-2},
        "evaluation": {"everySteps": steps},
    }
    return Learning("reward", 0.6, 0.85, changes=changes)


CASES = (
    Case(
        "grpo-lora",
        {"spread": 0.2},
        prompts(),
        {**reinforcement("GRPO", [VOWELS, LENGTH]), **HELD_OUT},
        learning=_learns(40, 4, generations=8),
    ),
    Case(
        "grpo-full",
        {"spread": 0.2},
        prompts(),
        {**reinforcement("GRPO", [VOWELS], iterations=2), **HELD_OUT, "tuning": {"type": "Full", "lora": None}},
    ),
    Case(
        "ppo-lora",
        {"spread": 0.2},
        prompts(),
        {**reinforcement("PPO", [VOWELS]), **HELD_OUT},
        learning=_learns(120, 16),
    ),
)
