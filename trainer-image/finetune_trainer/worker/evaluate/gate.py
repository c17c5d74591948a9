"""The gate: whether the tuned model meets evaluation.require."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.job import Requirement


@dataclass(frozen=True)
class Verdict:
    """One requirement and what was measured; value None: the metric could not be measured."""

    requirement: Requirement
    value: float | None

    @property
    def met(self) -> bool:
        """Whether the value lies within the bounds, both of which pass themselves; what is not a number fails."""
        wish, value = self.requirement, self.value
        if value is None or math.isnan(value):
            return False
        return (wish.min is None or value >= wish.min) and (wish.max is None or value <= wish.max)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**self.requirement.to_json(), "value": self.value, "met": self.met}

    def __str__(self) -> str:
        bounds = {"at least": self.requirement.min, "at most": self.requirement.max}
        wished = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        found = "was not measured" if self.value is None else f"is {self.value:.6g}"
        return f"{self.requirement.metric} {found}, but has to be {wished}"


def judge(require: Sequence[Requirement], metrics: Mapping[str, float]) -> tuple[Verdict, ...]:
    """A verdict on each requirement, in their order."""
    return tuple(Verdict(requirement, metrics.get(requirement.metric)) for requirement in require)


def unmet_message(verdicts: Sequence[Verdict]) -> str | None:
    """What fails, for the person who asked for it; None if nothing does."""
    failed = [str(verdict) for verdict in verdicts if not verdict.met]
    if not failed:
        return None
    return (
        f"The tuned model does not meet evaluation.require: {'; '.join(failed)}. Artifact and report are published all "
        "the same. Train longer or on better data, or change the bound."
    )
