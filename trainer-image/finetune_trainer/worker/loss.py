"""Losses that are exact under any split of a step into micro batches and ranks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

IGNORED = -100


def next_token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of all counted tokens, in fp32.

    logits: [batch, length, vocabulary]; labels: [batch, length], not shifted, IGNORED where not counted.
    """
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(predicted, labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum")


def counted_tokens(labels: Tensor) -> Tensor:
    """How many tokens of labels the loss counts (position 0 is never predicted)."""
    return (labels[:, 1:] != IGNORED).sum()
