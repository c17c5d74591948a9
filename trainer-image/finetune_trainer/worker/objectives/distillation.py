"""Distillation: the student learns from the labels and from the teacher's whole distribution.

Loss of a unit: alpha · cross entropy + (1 − alpha) · T² · KL(teacher ‖ student), both distributions softened by the
temperature T (Hinton, Vinyals and Dean 2015; T² keeps the gradients' scale).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetune_api.runfile import RunDistillation
from finetune_trainer.worker.loss import IGNORED, counted_logits, shifted
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.objectives.causal import CausalSupervised
from finetune_trainer.worker.objectives.classification import SequenceClassification
from finetune_trainer.worker.packing import model_inputs
from finetune_trainer.worker.teacher import load_teacher, teacher_classes

# Numbers of one chunk of fp32 log probabilities: 64 MiB each.
_CHUNK_NUMBERS = 1 << 24


def divergence_sum(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Sum over rows of T² · KL(teacher ‖ student), an fp32 scalar.

    student, teacher: [all rows, classes], of which the leading classes that both have count. rows: numbers of those that
    count, [n]. Worked out in chunks that are computed again in the backward pass, so that memory does not grow with n.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[:, :shared], teacher[:, :shared]
    # With no row to count, the sum still depends on the student, so that every rank has the same graph.
    total = student[:1].float().sum() * 0.0
    for chunk in rows.split(max(1, _CHUNK_NUMBERS // shared)) if len(rows) else ():
        total = total + checkpoint(
            _divergence, student, teacher, chunk, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _divergence(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    ours = functional.log_softmax(student[rows].float() / temperature, -1)
    theirs = functional.log_softmax(teacher[rows].float() / temperature, -1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


class Asked:
    """The student in one pass: it is asked once, and every further call gives the same answer.

    So the task's own code works out its loss, and the divergence is over the same logits.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: as a wrapper of models calls what it wraps."""
        self.module = module
        self._answer: Any = None

    def __call__(self, **inputs: Any) -> Any:
        if self._answer is None:
            self._answer = self.module(**inputs)
        return self._answer


class Distilled(Objective):
    """Mixed into the supervised objective of a task: adds the teacher to its loss and to what it measures.

    The teacher is frozen, in evaluation mode, whole on each rank, and no part of the student: each keeps its own dropout.
    """

    likelihood = False
    teacher: PreTrainedModel

    def attach(self, engine: Any) -> None:
        """Load the teacher to the student's device."""
        super().attach(engine)
        folder = engine.supervision.work.inputs / "teacher"
        self.teacher = load_teacher(folder, self.run, self.tokenizer, head=self.head, device=engine.args.device)

    @property
    def settings(self) -> RunDistillation:
        """The run's settings of distillation."""
        assert self.run.objective.distillation is not None  # the planner gives every such run its settings
        return self.run.objective.distillation

    @abstractmethod
    def counted(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits as [rows, classes], numbers of the rows that count) of either model's logits."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """alpha · label loss + (1 − alpha) · T² · divergence, summed; both parts are noted for the log."""
        asked = Asked(model)
        labels = super().loss_sum(asked, batch)
        divergence = self._divergence(asked, batch)
        if torch.is_grad_enabled():
            units = self.units(batch)
            self.note("labelLoss", labels.total, units)
            self.note("divergence", divergence / self.settings.temperature**2, units)
        return Loss(self._mixed(labels.total, divergence), labels.auxiliary)

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """What the task measures, its loss as labelLoss; the mixed loss, and divergence (the KL itself, without T²)."""
        asked = Asked(model)
        sums = super().measure(asked, batch)
        labels, units = sums["loss"]
        divergence = self._divergence(asked, batch).to(labels)
        mixed = torch.stack([self._mixed(labels, divergence), units])
        plain = torch.stack([divergence / self.settings.temperature**2, units])
        return {**sums, "loss": mixed, "labelLoss": sums["loss"], "divergence": plain}

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """The task's metrics, labelLoss and divergence."""
        return {**super().metrics(means), "labelLoss": means["labelLoss"], "divergence": means["divergence"]}

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits for the batch, its classes in the order of the student's."""
        return self.teacher(**model_inputs(batch))["logits"]

    def _divergence(self, asked: Asked, batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs, _ = self.counted(self.teacher_logits(batch), batch)
        ours, rows = self.counted(asked(**model_inputs(batch))["logits"], batch)
        return divergence_sum(ours, theirs, rows, self.settings.temperature)

    def _mixed(self, labels: Tensor, divergence: Tensor) -> Tensor:
        alpha = self.settings.alpha
        return alpha * labels + (1 - alpha) * divergence


class CausalDistillation(Distilled, CausalSupervised):
    """Unit: a token in the loss."""

    def counted(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As in Distilled: a token is predicted at the place before it. Only places that count may have logits."""
        wanted = (shifted(batch["labels"]) != IGNORED).flatten()
        rows = logits.flatten(0, -2)
        return rows, wanted.nonzero()[:, 0] if len(rows) == len(wanted) else torch.arange(len(rows), device=rows.device)

    def teacher_logits(self, batch: Batch) -> Tensor:
        """Those of the places that count, [places, classes]."""
        return counted_logits(self.teacher, model_inputs(batch), shifted(batch["labels"]))[0]

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """loss, labelLoss and its perplexity, divergence, tokenAccuracy."""
        return {**super().metrics(means), "perplexity": math.exp(min(means["labelLoss"], 700.0))}


class ClassifierDistillation(Distilled, SequenceClassification):
    """Unit: a record. The teacher's classes are found by their names."""

    def attach(self, engine: Any) -> None:
        """Load the teacher and put its classes into the order of the student's."""
        super().attach(engine)
        self.classes = teacher_classes(self.teacher, self.data.labels)

    def counted(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As in Distilled."""
        return logits, (batch["labels"] != IGNORED).nonzero()[:, 0]

    def teacher_logits(self, batch: Batch) -> Tensor:
        """As in Distilled."""
        return super().teacher_logits(batch)[:, self.classes]
