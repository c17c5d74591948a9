"""Masked language models: the hidden tokens of a text are predicted from both sides (Devlin et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.data import EncodedExample
from finetune_trainer.worker.heads import MASKED_HEAD
from finetune_trainer.worker.loss import IGNORED, counted_logits, token_sums
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_arrays


class MaskedText(Objective):
    """Unit: a hidden token. The items are masked already (data.noise), so that nothing is drawn here."""

    head = MASKED_HEAD
    generates = False
    likelihood = True

    def length(self, item: EncodedExample) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedExample]) -> Batch:
        """input_ids, attention_mask and labels, each [batch, longest]; labels are not shifted."""
        ids, mask = pad_arrays([item.input_ids for item in items], self.tokenizer.pad_token_id or 0)
        labels, _ = pad_arrays([item.labels for item in items], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def units(self, batch: Batch) -> Tensor:
        """Hidden tokens."""
        return (batch["labels"] != IGNORED).sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies of the hidden tokens."""
        logits, wanted = hidden_tokens(model, batch)
        return Loss(functional.cross_entropy(logits, wanted, reduction="sum"))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss and tokenAccuracy, both for each hidden token."""
        return token_sums(*hidden_tokens(model, batch))


def hidden_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(fp32 logits [hidden tokens, vocabulary], the tokens [hidden tokens]); there may be none."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits, wanted, _ = counted_logits(model, inputs, batch["labels"])
    return logits, wanted
