"""Sequences of unequal length as rectangular batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune_trainer.worker.loss import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pad_arrays(arrays: Sequence[NDArray[Any]], fill: int) -> tuple[Tensor, Tensor]:
    """(values, mask): both int64 [rows, longest], padded on the right; no arrays give one row of two with mask 1."""
    longest = max((len(array) for array in arrays), default=2)
    rows = max(len(arrays), 1)
    values = torch.full((rows, longest), fill, dtype=torch.long)
    mask = torch.zeros((rows, longest), dtype=torch.long)
    for row, array in enumerate(arrays):
        values[row, : len(array)] = torch.from_numpy(array.astype("int64"))
        mask[row, : len(array)] = 1
    if not arrays:
        mask[:] = 1
    return values, mask


def pad_sequences(examples: Sequence[Any]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of items with input_ids and labels, each [batch, longest].

    labels[:, 0] is IGNORED. No examples give one row with no label.
    """
    ids, mask = pad_arrays([e.input_ids for e in examples], 0)
    labels, _ = pad_arrays([e.labels for e in examples], IGNORED)
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
