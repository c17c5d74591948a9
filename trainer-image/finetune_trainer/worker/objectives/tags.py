"""Supervised tagging of words: cross entropy of the tag at the first piece of each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.data.kinds import EncodedTags
from finetune_trainer.worker.heads import TOKEN_CLASSIFICATION_HEAD, Head
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.metrics import entity_counts, f1
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_arrays


class TokenClassification(Objective):
    """Unit: a word."""

    head: ClassVar[Head] = TOKEN_CLASSIFICATION_HEAD
    generates: ClassVar[bool] = False

    def length(self, item: EncodedTags) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedTags]) -> Batch:
        """input_ids, attention_mask and labels, each [batch, longest]."""
        ids, mask = pad_arrays([item.input_ids for item in items], 0)
        labels, _ = pad_arrays([item.labels for item in items], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def units(self, batch: Batch) -> Tensor:
        """Words."""
        return (batch["labels"] != IGNORED).sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies."""
        return Loss(_loss_sum(_logits(model, batch), batch["labels"]))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss and accuracy for each word; precision and recall of whole entities."""
        logits, labels = _logits(model, batch), batch["labels"]
        kept = labels != IGNORED
        right = (logits.argmax(-1) == labels)[kept].sum()
        words = kept.sum().double()
        sums = {
            "loss": torch.stack([_loss_sum(logits, labels).double(), words]).cpu(),
            "accuracy": torch.stack([right.double(), words]).cpu(),
            "precision": torch.zeros(2, dtype=torch.float64),
            "recall": torch.zeros(2, dtype=torch.float64),
        }
        for actual, predicted in self._tags(logits, labels):
            for name, pair in entity_counts(actual, predicted).items():
                sums[name] += torch.tensor(pair, dtype=torch.float64)
        return sums

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """loss, accuracy, and precision, recall and f1 of whole entities."""
        return {**means, "f1": f1(means["precision"], means["recall"])}

    def metric_notes(self) -> dict[str, str]:
        """What precision, recall and F1 count."""
        return dict.fromkeys(("precision", "recall", "f1"), "of whole entities, over all types together (micro)")

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest tag and the true tag of each word that the model saw."""
        return [
            {"prediction": predicted, "label": actual}
            for actual, predicted in self._tags(_logits(model, batch), batch["labels"])
            if actual
        ]

    def _tags(self, logits: Tensor, labels: Tensor) -> list[tuple[list[str], list[str]]]:
        """(true, predicted) tags of the words of each row."""
        names = self.data.labels
        found = []
        for actual, predicted in zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True):
            pairs = [(names[a], names[p]) for a, p in zip(actual, predicted, strict=True) if a != IGNORED]
            found.append(([a for a, _ in pairs], [p for _, p in pairs]))
        return found


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs)["logits"].float()


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
