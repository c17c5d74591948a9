"""Which encoder turns a record into an item: one for each (objective, task)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.failures import FinetuneError
from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.formats import Example
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodingRules:
    """The settings that encoding depends on. labels: names of the classes or tags, in the order of their numbers."""

    loss_on: LossOn
    truncation: Truncation
    max_length: int
    max_source: int | None = None
    max_target: int | None = None
    labels: Sequence[str] = ()


class RecordEncoder(Protocol):
    """Turns examples into items."""

    tokenizer: TextTokenizer

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The encoding; a BadRecord if it is too long or teaches nothing; None if the cut left nothing to learn."""

    def show(self, item: Any) -> str:
        """The item as text, the parts in the loss between ⟦ and ⟧; its label or tags behind it."""


def _causal(tokenizer: TextTokenizer, rules: EncodingRules) -> RecordEncoder:
    return Encoder(tokenizer, loss_on=rules.loss_on, truncation=rules.truncation, max_length=rules.max_length)


REGISTRY: dict[tuple[ObjectiveType, Task], Callable[[TextTokenizer, EncodingRules], RecordEncoder]] = {
    (ObjectiveType.SUPERVISED, Task.CAUSAL_LM): _causal,
}


def make_encoder(objective: ObjectiveType, task: Task, tokenizer: TextTokenizer, rules: EncodingRules) -> RecordEncoder:
    """The encoder of an objective on a task; Evaluation reads as Supervised does. Raises InvalidSpec without one."""
    kind = ObjectiveType.SUPERVISED if objective is ObjectiveType.EVALUATION else objective
    make = REGISTRY.get((kind, task))
    if make is None:
        raise FinetuneError(
            f"Objective {kind} of a {task} model is not in this release.",
            failure_class="InvalidSpec",
            field="spec.objective.type",
        )
    return make(tokenizer, rules)
