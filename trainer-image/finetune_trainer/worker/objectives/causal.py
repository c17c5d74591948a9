"""Supervised fine-tuning of a causal model: cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune_trainer.data import EncodedExample
from finetune_trainer.worker.loss import counted_tokens, next_token_loss_sum
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_sequences


class CausalSupervised(Objective):
    """Unit: a token in the loss."""

    def length(self, item: EncodedExample) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedExample]) -> Batch:
        """input_ids, attention_mask and labels, each [batch, longest].

        labels[:, 0] is IGNORED: nothing predicts the first token, and so each way to count tokens agrees.
        """
        return pad_sequences(items)

    def units(self, batch: Batch) -> Tensor:
        """Tokens in the loss."""
        return counted_tokens(batch["labels"])

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return Loss(next_token_loss_sum(model(**inputs)["logits"], batch["labels"]))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss and tokenAccuracy, both for each token in the loss."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        logits = model(**inputs)["logits"]
        tokens = counted_tokens(labels).double()
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum().double()
        return {
            "loss": torch.stack([next_token_loss_sum(logits, labels).double(), tokens]),
            "tokenAccuracy": torch.stack([right, tokens]),
        }
