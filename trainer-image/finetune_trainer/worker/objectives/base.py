"""What every objective says of itself; the engine does the rest.

An objective's loss is a sum over units (tokens, records, pairs). The engine divides it by the units of the whole
optimizer step, over all micro batches and ranks, so that any split of the step gives the same gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded
from finetune_trainer.worker.heads import CAUSAL_HEAD, Head
from finetune_trainer.worker.loading import load_base, padding_id
from finetune_trainer.worker.tokenizers import resize_embeddings

Batch = dict[str, Tensor]
Sums = dict[str, Tensor]
"""Name → tensor of shape [2]: a sum, and how many things it is over."""


@dataclass(frozen=True)
class Loss:
    """What one micro batch adds.

    total: fp32 scalar, a sum over the batch's units. auxiliary: a mean-like term (a router's balance) that is averaged
    over the micro batches of the step: it is nonlinear in the batch, so a split changes it a little.
    """

    total: Tensor
    auxiliary: Tensor | None = None


@dataclass
class Objective(ABC):
    """One objective on one task: how records become batches, what is minimised, what evaluation measures."""

    run: RunFile
    data: Encoded
    tokenizer: PreTrainedTokenizerFast
    noted: Sums = field(default_factory=dict)

    head: ClassVar[Head] = CAUSAL_HEAD
    """How the base is loaded."""
    generates: ClassVar[bool] = True
    """Whether the model writes text, so that answers to held-out prompts can be shown."""
    likelihood: ClassVar[bool] = False
    """Whether the evaluation's loss is a mean negative log likelihood of tokens, so that exp(loss) is a perplexity."""

    # ---- data

    @abstractmethod
    def length(self, item: Any) -> int:
        """Tokens of an item: those of equal length are put side by side."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Batch:
        """A batch on the host. No items: one row which every collective can run on and which adds nothing."""

    # ---- the model

    def load_model(self, folder: Path, device: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base model for this objective, before tuning is put on it, with room for the run's added tokens.

        dtype: as the run trains it when None.
        """
        model = load_base(
            folder,
            self.run,
            head=self.head,
            labels=self.data.labels,
            pad_id=padding_id(self.tokenizer),
            dtype=dtype,
            device=device,
        )
        if self.run.model.add_special_tokens:
            resize_embeddings(model, self.tokenizer)
        return model

    def attach(self, engine: Any) -> None:  # noqa: B027  # most objectives have nothing to attach
        """Called once, when the engine has its model and device and before any batch: make further models here."""

    def roll_out(self, engine: Any, batches: list[Batch]) -> list[Batch]:
        """The batches that the step trains on, from those of the loader. Online objectives generate here."""
        return batches

    @property
    def repeats(self) -> int:
        """How many optimizer steps in a row get the same batches from the loader."""
        return 1

    def own_state(self) -> dict[str, dict[str, Tensor]]:
        """What this rank needs to go on, beside the model: tensors by their names, by the name of a safetensors file.

        Every rank calls it at each checkpoint.
        """
        return {}

    def load_state(self, folder: Path) -> None:  # noqa: B027
        """Take up what own_state gave, after the model's weights; raises CheckpointInvalid."""

    # ---- the loss

    def tokens(self, batch: Batch) -> int:
        """Input tokens of a batch, for the throughput."""
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """How many units the batch's loss is summed over: a scalar; the model is not asked."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch on the model's device; with gradient in training, also used in evaluation."""

    def note(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a training metric; the engine logs total / count over all ranks at the step's end.

        Every rank must note the same names in each step.
        """
        pair = torch.stack([torch.as_tensor(total).detach().double().cpu(), torch.as_tensor(count).double().cpu()])
        self.noted[name] = self.noted[name] + pair if name in self.noted else pair

    # ---- evaluation

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """Sums over a held-out batch, without gradient; the same names for every batch, `loss` among them."""
        units = self.units(batch)
        return {
            "loss": torch.stack([self.loss_sum(model, batch).total.double(), units.double().to(self.device(batch))])
        }

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics from the means over the whole set; what is not a mean (F1) is worked out here."""
        return dict(means)

    def metric_notes(self) -> dict[str, str]:
        """What the report says beside a metric, by its name."""
        return {}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """One mapping for each row of a held-out batch, without gradient: prediction, label, probabilities (by class).

        Goes to predictions.jsonl. Empty where the model decides nothing: then its generated answers stand there.
        """
        return []

    @staticmethod
    def device(batch: Batch) -> torch.device:
        """The device that the batch lies on."""
        return next(iter(batch.values())).device
