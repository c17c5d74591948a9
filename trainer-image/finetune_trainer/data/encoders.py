"""Which encoder turns a record into an item: one for each (objective, task)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from finetune_api.failures import FinetuneError
from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_api.runfile import RunFile
from finetune_trainer.data.documents import DocumentEncoder
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.formats import Example
from finetune_trainer.data.labels import LabelEncoder
from finetune_trainer.data.preference import JudgedEncoder, PairEncoder
from finetune_trainer.data.prompts import PromptEncoder
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.seq2seq import Seq2SeqEncoder
from finetune_trainer.data.tags import TagEncoder
from finetune_trainer.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodingRules:
    """The settings that encoding depends on. labels: names of the classes or tags, in the order of their numbers.

    new_tokens: how much of max_length the model itself writes (PPO, GRPO).
    """

    loss_on: LossOn
    truncation: Truncation
    max_length: int
    max_source: int | None = None
    max_target: int | None = None
    labels: Sequence[str] = ()
    new_tokens: int = 0


class RecordEncoder(Protocol):
    """Turns examples into items."""

    tokenizer: TextTokenizer

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """The encoding; a BadRecord if it is too long or teaches nothing; None if the cut left nothing to learn."""

    def show(self, item: Any) -> str:
        """The item as text, the parts in the loss between ⟦ and ⟧; its label or tags behind it."""


def _causal(tokenizer: TextTokenizer, rules: EncodingRules) -> RecordEncoder:
    return Encoder(
        tokenizer,
        loss_on=rules.loss_on,
        truncation=rules.truncation,
        max_length=rules.max_length,
        max_source=rules.max_source,
        max_target=rules.max_target,
    )


REGISTRY: dict[tuple[ObjectiveType, Task], Callable[[TextTokenizer, EncodingRules], RecordEncoder]] = {
    (ObjectiveType.SUPERVISED, Task.CAUSAL_LM): _causal,
    (ObjectiveType.SUPERVISED, Task.SEQUENCE_CLASSIFICATION): LabelEncoder,
    (ObjectiveType.SUPERVISED, Task.TOKEN_CLASSIFICATION): TagEncoder,
    (ObjectiveType.SUPERVISED, Task.SEQ2SEQ): Seq2SeqEncoder,
    (ObjectiveType.PRETRAIN, Task.CAUSAL_LM): _causal,
    (ObjectiveType.PRETRAIN, Task.MASKED_LM): partial(DocumentEncoder, task=Task.MASKED_LM),
    (ObjectiveType.PRETRAIN, Task.SEQ2SEQ): partial(DocumentEncoder, task=Task.SEQ2SEQ),
    (ObjectiveType.DISTILLATION, Task.CAUSAL_LM): _causal,
    (ObjectiveType.DISTILLATION, Task.SEQUENCE_CLASSIFICATION): LabelEncoder,
    (ObjectiveType.REWARD, Task.SEQUENCE_CLASSIFICATION): PairEncoder,
    (ObjectiveType.DPO, Task.CAUSAL_LM): PairEncoder,
    (ObjectiveType.ORPO, Task.CAUSAL_LM): PairEncoder,
    (ObjectiveType.KTO, Task.CAUSAL_LM): JudgedEncoder,
    (ObjectiveType.PPO, Task.CAUSAL_LM): PromptEncoder,
    (ObjectiveType.GRPO, Task.CAUSAL_LM): PromptEncoder,
}


def method(run: RunFile) -> ObjectiveType:
    """Under which objective a run's encoder and loss are registered.

    Evaluation reads as Supervised does; text that is noised (MaskedLM, Seq2Seq) or joined (CausalLM) as Pretrain does.
    """
    kind = run.objective.type
    if run.objective.pretrain is not None:
        return ObjectiveType.PRETRAIN
    return ObjectiveType.SUPERVISED if kind is ObjectiveType.EVALUATION else kind


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
