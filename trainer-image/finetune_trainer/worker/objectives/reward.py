"""Reward models: the preferred completion of a pair gets the larger score.

Source of the loss: Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv:2203.02155), equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_trainer.data.kinds import EncodedPair
from finetune_trainer.worker.heads import REWARD_HEAD, Head
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.padding import pad_arrays


class Reward(Objective):
    """Unit: a pair."""

    head: ClassVar[Head] = REWARD_HEAD
    generates: ClassVar[bool] = False
    pad_id: int = 0
    """What the model takes for padding: it scores at the last token that is another."""

    def load_model(self, folder: Path, device: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base with one output; what it takes for padding is kept."""
        model = super().load_model(folder, device, dtype)
        self.pad_id = model.config.get_text_config().pad_token_id or 0
        return model

    def length(self, item: EncodedPair) -> int:
        """Tokens of the longer completion: both are rows of one batch."""
        return max(len(item.chosen_ids), len(item.rejected_ids))

    def collate(self, items: Sequence[EncodedPair]) -> Batch:
        """input_ids and attention_mask [2 · pairs, longest], the preferred ones first, and counted [pairs]: 1 each."""
        rows = [item.chosen_ids for item in items] + [item.rejected_ids for item in items]
        ids, mask = pad_arrays(rows, self.pad_id)
        if not items:
            ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        counted = torch.ones(len(items)) if items else torch.zeros(1)
        return {"input_ids": ids, "attention_mask": mask, "counted": counted}

    def units(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch["counted"].sum()

    def margins(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(preferred - other, preferred, other): scores, each of shape [pairs], fp32."""
        inputs = {name: value for name, value in batch.items() if name != "counted"}
        chosen, rejected = model(**inputs)["logits"].float()[:, 0].chunk(2)
        return chosen - rejected, chosen, rejected

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum of -log sigmoid(preferred - other)."""
        return Loss(_loss_sum(self.margins(model, batch)[0], batch["counted"]))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss, rewardMargin (preferred - other) and accuracy (share of pairs in the right order), for each pair."""
        margin, counted = self.margins(model, batch)[0], batch["counted"]
        pairs = counted.sum()
        sums = {
            "loss": _loss_sum(margin, counted),
            "rewardMargin": (margin * counted).double().sum(),
            "accuracy": ((margin > 0) * counted).sum(),
        }
        return {name: torch.stack([total.double(), pairs.double()]) for name, total in sums.items()}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The scores of both completions of each pair."""
        _, chosen, rejected = self.margins(model, batch)
        rows = zip(chosen.tolist(), rejected.tolist(), batch["counted"].tolist(), strict=True)
        return [{"chosenReward": better, "rejectedReward": other} for better, other, count in rows if count]


def _loss_sum(margin: Tensor, counted: Tensor) -> Tensor:
    return -(functional.logsigmoid(margin) * counted).sum()
