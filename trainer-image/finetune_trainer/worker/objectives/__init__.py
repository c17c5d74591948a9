"""The objectives: one class for each (objective type, task)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task
from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded
from finetune_trainer.data.encoders import method
from finetune_trainer.worker.objectives.base import Objective
from finetune_trainer.worker.objectives.causal import CausalSupervised
from finetune_trainer.worker.objectives.classification import SequenceClassification
from finetune_trainer.worker.objectives.distillation import CausalDistillation, ClassifierDistillation
from finetune_trainer.worker.objectives.grpo import Grpo
from finetune_trainer.worker.objectives.kto import Kto
from finetune_trainer.worker.objectives.ppo import Ppo
from finetune_trainer.worker.objectives.preference import Dpo, Orpo
from finetune_trainer.worker.objectives.pretrain import CausalPretrain, MaskedPretrain, SpanCorruption
from finetune_trainer.worker.objectives.reward import Reward
from finetune_trainer.worker.objectives.seq2seq import Seq2Seq
from finetune_trainer.worker.objectives.tags import TokenClassification

REGISTRY: dict[tuple[ObjectiveType, Task], type[Objective]] = {
    (ObjectiveType.SUPERVISED, Task.CAUSAL_LM): CausalSupervised,
    (ObjectiveType.SUPERVISED, Task.SEQUENCE_CLASSIFICATION): SequenceClassification,
    (ObjectiveType.SUPERVISED, Task.TOKEN_CLASSIFICATION): TokenClassification,
    (ObjectiveType.SUPERVISED, Task.SEQ2SEQ): Seq2Seq,
    (ObjectiveType.PRETRAIN, Task.CAUSAL_LM): CausalPretrain,
    (ObjectiveType.PRETRAIN, Task.MASKED_LM): MaskedPretrain,
    (ObjectiveType.PRETRAIN, Task.SEQ2SEQ): SpanCorruption,
    (ObjectiveType.DISTILLATION, Task.CAUSAL_LM): CausalDistillation,
    (ObjectiveType.DISTILLATION, Task.SEQUENCE_CLASSIFICATION): ClassifierDistillation,
    (ObjectiveType.REWARD, Task.SEQUENCE_CLASSIFICATION): Reward,
    (ObjectiveType.DPO, Task.CAUSAL_LM): Dpo,
    (ObjectiveType.ORPO, Task.CAUSAL_LM): Orpo,
    (ObjectiveType.KTO, Task.CAUSAL_LM): Kto,
    (ObjectiveType.GRPO, Task.CAUSAL_LM): Grpo,
    (ObjectiveType.PPO, Task.CAUSAL_LM): Ppo,
}


def objective_class(run: RunFile) -> type[Objective]:
    """The objective of a run, as data.encoders.method finds it. Raises InvalidSpec for a pair without one."""
    found = REGISTRY.get((method(run), run.model.task))
    if found is None:
        raise FinetuneError(
            f"Objective {run.objective.type} of a {run.model.task} model is not in this release.",
            failure_class="InvalidSpec",
            field="spec.objective.type",
        )
    return found


def make_objective(run: RunFile, data: Encoded, tokenizer: PreTrainedTokenizerFast) -> Objective:
    """The objective of a run, with its data."""
    return objective_class(run)(run, data, tokenizer)
