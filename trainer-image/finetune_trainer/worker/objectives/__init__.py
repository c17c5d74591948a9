"""The objectives: one class for each (objective type, task)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task
from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded
from finetune_trainer.worker.objectives.base import Objective
from finetune_trainer.worker.objectives.causal import CausalSupervised

REGISTRY: dict[tuple[ObjectiveType, Task], type[Objective]] = {
    (ObjectiveType.SUPERVISED, Task.CAUSAL_LM): CausalSupervised,
}


def objective_class(run: RunFile) -> type[Objective]:
    """The objective of a run; Evaluation measures as Supervised does. Raises InvalidSpec for a pair without one."""
    kind = ObjectiveType.SUPERVISED if run.objective.type is ObjectiveType.EVALUATION else run.objective.type
    found = REGISTRY.get((kind, run.model.task))
    if found is None:
        raise FinetuneError(
            f"Objective {kind} of a {run.model.task} model is not in this release.",
            failure_class="InvalidSpec",
            field="spec.objective.type",
        )
    return found


def make_objective(run: RunFile, data: Encoded, tokenizer: PreTrainedTokenizerFast) -> Objective:
    """The objective of a run, with its data."""
    return objective_class(run)(run, data, tokenizer)
