"""Supervised classification of texts: cross entropy of the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_trainer.data.kinds import EncodedLabel
from finetune_trainer.worker.heads import SEQUENCE_CLASSIFICATION_HEAD, Head
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.metrics import class_counts, class_metrics
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_arrays


class SequenceClassification(Objective):
    """Unit: a record."""

    head: ClassVar[Head] = SEQUENCE_CLASSIFICATION_HEAD
    generates: ClassVar[bool] = False
    pad_id: int = 0
    """What the model takes for padding: causal ones classify at the last token that is another."""

    def load_model(self, folder: Path, device: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base with its head; what it takes for padding is kept."""
        model = super().load_model(folder, device, dtype)
        self.pad_id = model.config.get_text_config().pad_token_id or 0
        return model

    def length(self, item: EncodedLabel) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedLabel]) -> Batch:
        """input_ids and attention_mask [batch, longest], padded on the right, and labels [batch]."""
        ids, mask = pad_arrays([item.input_ids for item in items], self.pad_id)
        labels = torch.tensor([item.label for item in items] or [IGNORED], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def units(self, batch: Batch) -> Tensor:
        """Records."""
        return (batch["labels"] != IGNORED).sum()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of shape [batch, classes], fp32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs)["logits"].float()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed cross entropies."""
        return Loss(_loss_sum(self.logits(model, batch), batch["labels"]))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss for each record, and the counts of class_counts."""
        logits, labels = self.logits(model, batch), batch["labels"]
        kept, classes = labels != IGNORED, logits.shape[-1]
        cells = labels[kept] * classes + logits.argmax(-1)[kept]
        confusion = torch.bincount(cells, minlength=classes * classes).view(classes, classes).tolist()
        sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in class_counts(confusion).items()}
        loss = torch.stack([_loss_sum(logits, labels).double(), kept.sum().double()]).cpu()
        return {"loss": loss, **sums}

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """loss, accuracy, precision, recall and f1 (metric_notes says of what)."""
        return {"loss": means["loss"], **class_metrics(means, len(self.data.labels))}

    def metric_notes(self) -> dict[str, str]:
        """Which classes precision, recall and F1 are of."""
        labels = self.data.labels
        note = f"of the label {labels[1]!r}" if len(labels) == 2 else f"plain mean over {len(labels)} labels (macro)"
        return dict.fromkeys(("precision", "recall", "f1"), note)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest label of each record, its own label, and the probability of every label."""
        names = self.data.labels
        logits = self.logits(model, batch)
        rows = zip(batch["labels"].tolist(), logits.argmax(-1).tolist(), logits.softmax(-1).tolist(), strict=True)
        return [
            {
                "prediction": names[predicted],
                "label": names[label],
                "probabilities": dict(zip(names, probabilities, strict=True)),
            }
            for label, predicted, probabilities in rows
            if label != IGNORED
        ]


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
