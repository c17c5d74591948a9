"""What preference and reinforcement objectives share: log-probabilities, the reference policy, dropout put off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from finetune_api.failures import FinetuneError
from finetune_trainer.worker.loss import IGNORED

_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "attn_dropout_p", "layerdrop")


def token_log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each counted token, fp32 [rows, length - 1]; 0 where labels are IGNORED.

    logits: [rows, virtual tokens + length, vocabulary]; labels: [rows, length], not shifted. temperature: that of the
    sampling, so that the probabilities are those of the distribution which the tokens were drawn from.
    """
    length = labels.shape[1]
    predicted = logits[:, -length:][:, :-1].float() / temperature
    wanted = labels[:, 1:]
    losses = functional.cross_entropy(
        predicted.reshape(-1, predicted.shape[-1]), wanted.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(wanted.shape)


def counted(labels: Tensor) -> Tensor:
    """Which predictions count: bool [rows, length - 1], beside token_log_probs."""
    return labels[:, 1:] != IGNORED


def put_off_dropout(model: nn.Module) -> None:
    """Turn every dropout of model off.

    These objectives compare the policy with a reference or with its own past. With dropout the ratio would measure the
    noise of the mask: it would not be 1 before the first update.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class ReferencePolicy:
    """The policy as it was before the first step of the run, also after a resume.

    It is made while the model still holds its starting weights. Only what trains can differ from the start, so only
    that is kept: next to nothing for an adapter, a second copy of the weights for Full. With an earlier adapter to
    continue from the reference is base and earlier adapter, not the bare base.
    """

    def __init__(self, engine: Any) -> None:
        """engine: before it has loaded a checkpoint. Raises InvalidSpec where the start cannot be kept (ZeRO-3)."""
        self.model: nn.Module = engine.model
        sharded = engine.supervision.zero_stage == 3
        if sharded and (not isinstance(self.model, PeftModel) or engine.objective.run.model.adapter is not None):
            raise FinetuneError(
                "zeroStage 3 shards the weights, and this objective keeps a copy of the starting weights as its "
                "reference. Use zeroStage 2 or less, or a new adapter.",
                failure_class="InvalidSpec",
                field="spec.hyperparameters.zeroStage",
            )
        self._start = None if sharded else [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def in_force(self) -> Iterator[nn.Module]:
        """The reference in evaluation mode and without gradient; the policy is back afterwards."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            if self._start is None:
                assert isinstance(self.model, PeftModel)  # see __init__
                with self.model.disable_adapter():
                    yield self.model
            else:
                current = [p.data for p, _ in self._start]
                try:
                    for number, (p, start) in enumerate(self._start):
                        start = start.to(p.device, p.dtype)
                        self._start[number] = (p, start)
                        p.data = start
                    # Autocast keeps 16-bit copies of weights by their name, not by what is in them.
                    torch.clear_autocast_cache()
                    yield self.model
                finally:
                    for (p, _), data in zip(self._start, current, strict=True):
                        p.data = data
                    torch.clear_autocast_cache()
        self.model.train(was_training)


def as_bits(values: Tensor) -> Tensor:
    """fp32 values as int32 of the same bits: the library rounds every floating input to 16 bits under DeepSpeed."""
    return values.float().contiguous().view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """The fp32 values of as_bits."""
    return bits.view(torch.float32)
