"""Supervised fine-tuning of a causal model: cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetune_trainer.data import EncodedExample
from finetune_trainer.data.kinds import EncodedPacked
from finetune_trainer.worker.loading import PRECISIONS
from finetune_trainer.worker.loss import counted_logits, counted_tokens, shifted, token_sums
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.packing import model_inputs, packed_batch, packed_tokens
from finetune_trainer.worker.padding import pad_sequences
from finetune_trainer.worker.router import router_inputs, router_loss


class CausalSupervised(Objective):
    """Unit: a token in the loss."""

    likelihood = True

    def length(self, item: EncodedExample | EncodedPacked) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[Any]) -> Batch:
        """input_ids, attention_mask and labels, each [batch, longest]; packed records as `packed_batch` says.

        labels[:, 0] is IGNORED: nothing predicts the first token, and so each way to count tokens agrees.
        """
        if items and isinstance(items[0], EncodedPacked):
            assert self.data.isolation is not None  # records are packed only where a way was proven
            return packed_batch(items, self.data.isolation, PRECISIONS[self.run.hyperparameters.precision])
        return pad_sequences(items)

    def tokens(self, batch: Batch) -> int:
        """Tokens that are no padding."""
        return packed_tokens(batch["position_ids"]) if "position_ids" in batch else super().tokens(batch)

    def units(self, batch: Batch) -> Tensor:
        """Tokens in the loss."""
        return counted_tokens(batch["labels"])

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies; auxiliary: the router's balance of a mixture of experts."""
        inputs = {**model_inputs(batch), **router_inputs(model, self.run)}
        logits, targets, output = counted_logits(model, inputs, shifted(batch["labels"]))
        return Loss(cross_entropy(logits, targets, reduction="sum"), router_loss(output, model, self.run))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss and tokenAccuracy, both for each token in the loss."""
        logits, targets, _ = counted_logits(model, model_inputs(batch), shifted(batch["labels"]))
        return token_sums(logits, targets)
