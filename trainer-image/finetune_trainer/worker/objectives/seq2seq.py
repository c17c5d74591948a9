"""Supervised fine-tuning of sequence-to-sequence models: cross entropy of the target's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_api.failures import FinetuneError
from finetune_trainer.data.kinds import EncodedTarget
from finetune_trainer.worker.heads import SEQ2SEQ_HEAD, Head
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.router import router_inputs, router_loss


class Seq2Seq(Objective):
    """Unit: a token of a target, its end token included."""

    head: ClassVar[Head] = SEQ2SEQ_HEAD
    likelihood: ClassVar[bool] = True
    shift: Callable[[Tensor], Tensor]
    """The model's own way from labels to the decoder's input."""

    def load_model(self, folder: Path, device: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base; raises ModelUnsupported for one that does not say how its decoder starts."""
        model = super().load_model(folder, device, dtype)
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise FinetuneError(
                f"The architecture {model.config.model_type} does not say how its decoder starts. Use T5, Switch, BART "
                "or another sequence-to-sequence model.",
                failure_class="ModelUnsupported",
                field="spec.model.uri",
            )
        self.shift = model.prepare_decoder_input_ids_from_labels
        return model

    def length(self, item: EncodedTarget) -> int:
        """Tokens of source and target."""
        return len(item.input_ids) + len(item.labels)

    def tokens(self, batch: Batch) -> int:
        """Tokens of sources and targets."""
        return super().tokens(batch) + int((batch["labels"] != IGNORED).sum())

    def collate(self, items: Sequence[EncodedTarget]) -> Batch:
        """input_ids and attention_mask [batch, longest source], labels [batch, longest target]."""
        ids, mask = pad_arrays([item.input_ids for item in items], 0)
        labels, _ = pad_arrays([item.labels for item in items], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def units(self, batch: Batch) -> Tensor:
        """Tokens of the targets."""
        return (batch["labels"] != IGNORED).sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies; auxiliary: the router's balance of a mixture of experts."""
        output = self._output(model, batch, **router_inputs(model, self.run))
        return Loss(_loss_sum(output["logits"], batch["labels"]), router_loss(output, model, self.run))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss and tokenAccuracy, both for each token of the targets."""
        logits, labels = self._output(model, batch)["logits"], batch["labels"]
        tokens = self.units(batch).double()
        right = (logits.argmax(-1) == labels).sum().double()
        return {
            "loss": torch.stack([_loss_sum(logits, labels).double(), tokens]),
            "tokenAccuracy": torch.stack([right, tokens]),
        }

    def _output(self, model: nn.Module, batch: Batch, **options: bool) -> Any:
        """Its logits are of shape [batch, longest target, vocabulary]; place k is about label k."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, decoder_input_ids=self.shift(batch["labels"]), **options)


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
