"""Losses that are exact under any split of a step into micro batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
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


def shifted(labels: Tensor) -> Tensor:
    """What each place of [batch, length] labels predicts: the next token; IGNORED where that is not counted."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def counted_logits(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> tuple[Tensor, Tensor, Any]:
    """(fp32 logits [n, vocabulary] of the n places that count, their targets [n], the model's output).

    targets: [batch, length], IGNORED where a place does not count. The output layer sees the places that count and no
    other: of a chat's tokens about half are labelled, and with a large vocabulary that layer is most of a small model.
    Where the model's logits do not come straight from its output layer, they are chosen afterwards.
    """
    counted = targets != IGNORED
    head = _output_layer(model)
    before = head.register_forward_pre_hook(lambda _, given: _chosen(given, counted)) if head is not None else None
    try:
        output = model(**inputs)
    finally:
        if before is not None:
            before.remove()
    logits = output["logits"]
    if logits.shape[:2] == targets.shape:
        logits = logits[counted]
    return logits.reshape(-1, logits.shape[-1]).float(), targets[counted], output


def token_sums(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """loss and tokenAccuracy as sums over the n tokens of counted_logits, each beside n: fp64 [2]."""
    tokens = torch.tensor(float(len(targets)), dtype=torch.float64, device=targets.device)
    loss = functional.cross_entropy(logits, targets, reduction="sum").double()
    right = (logits.argmax(-1) == targets).sum().double()
    return {"loss": torch.stack([loss, tokens]), "tokenAccuracy": torch.stack([right, tokens])}


def _chosen(given: tuple[Any, ...], counted: Tensor) -> tuple[Any, ...] | None:
    """The hidden states [n, 1, width] that count, in place of [batch, length, width].

    One place a row: whoever looks at the length, as a soft prompt's does, has nothing to cut off.
    """
    hidden = given[0] if given else None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[0] != counted.shape[0]:
        return None
    virtual = hidden.shape[1] - counted.shape[1]  # a soft prompt's places in front of the text
    if virtual < 0:
        return None
    return (hidden[:, virtual:][counted].unsqueeze(1), *given[1:])


def _output_layer(model: nn.Module) -> nn.Module | None:
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None
