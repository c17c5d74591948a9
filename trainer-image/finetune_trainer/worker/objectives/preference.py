"""Preferences between two completions of one prompt: DPO and ORPO.

DPO: Rafailov et al. 2023, equation 7; label smoothing as in conservative DPO (Mitchell 2023).
ORPO: Hong et al. 2024, equations 3 to 7.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_api.runfile import RunPreference
from finetune_trainer.data.kinds import EncodedPair
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.objectives.policy import ReferencePolicy, counted, put_off_dropout, token_log_probs
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.router import router_inputs, router_loss

_LARGEST_LOG_PROB = -1e-6
"""A text of probability 1 has infinite odds; fp32 cannot tell a larger one from it."""


def dpo_losses(policy: Tensor, reference: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """(losses, margins), both [pairs]: −(1 − ε) log σ(m) − ε log σ(−m) with m = β((πc − πr) − (ρc − ρr)).

    policy, reference: [2, pairs], the summed log-probabilities of chosen and rejected. smoothing: ε, the assumed share
    of swapped pairs.
    """
    margins = beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
    losses = -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)
    return losses, margins


def orpo_losses(means: Tensor, weight: float) -> Tensor:
    """Losses [pairs]: −m_c − λ log σ(log odds(m_c) − log odds(m_r)), with log odds(m) = m − log(1 − exp m).

    means: [2, pairs], the mean log-probability for each token of chosen and rejected. weight: λ.
    """
    bounded = means.clamp(max=_LARGEST_LOG_PROB)
    odds = bounded - log1m_exp(bounded)
    return -means[0] - weight * functional.logsigmoid(odds[0] - odds[1])


def log1m_exp(values: Tensor) -> Tensor:
    """log(1 − exp(values)) of negative values, exact near 0 and far from it (Mächler 2012)."""
    near = values > -0.6931471805599453
    # Each branch gets values that are safe for it: the gradient of the one not taken must be finite too.
    first = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    second = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, first, second)


class Pairs(Objective):
    """Pairs of completions. Unit: a pair. Both completions go through the model in one pass."""

    @property
    def settings(self) -> RunPreference:
        """The preference settings of the run."""
        assert self.run.objective.preference is not None  # the planner fills it for these objectives
        return self.run.objective.preference

    def length(self, item: EncodedPair) -> int:
        """Tokens of the longer text."""
        return max(len(item.chosen_ids), len(item.rejected_ids))

    def collate(self, items: Sequence[EncodedPair]) -> Batch:
        """input_ids, attention_mask, labels [2 · pairs, longest], the chosen ones first; real [pairs], 0 for padding."""
        if not items:
            ids = torch.zeros((2, 2), dtype=torch.long)
            real = torch.zeros(1, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": ids + 1, "labels": ids + IGNORED, "real": real}
        ids, mask = pad_arrays([*(i.chosen_ids for i in items), *(i.rejected_ids for i in items)], 0)
        labels, _ = pad_arrays([*(i.chosen_labels for i in items), *(i.rejected_labels for i in items)], IGNORED)
        labels[:, 0] = IGNORED
        real = torch.ones(len(items), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "real": real}

    def units(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch["real"].sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """The pairs' losses, summed."""
        output = self.passed(model, batch)
        losses, margins = self.losses(self.log_probs(output, batch), batch)
        for name, pair in self._judged(margins, batch).items():
            self.note(name, pair[0], pair[1])
        return Loss((losses * batch["real"]).sum(), router_loss(output, model, self.run))

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss, rewardMargin and rewardAccuracy for each pair; a tie counts half."""
        losses, margins = self.losses(self.log_probs(self.passed(model, batch), batch), batch)
        real = batch["real"]
        loss = torch.stack([(losses * real).sum(), real.sum()]).double()
        return {"loss": loss, **self._judged(margins, batch)}

    @abstractmethod
    def losses(self, policy: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses, margins between the rewards of chosen and rejected), both fp32 [pairs]. policy: its log_probs."""

    def passed(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for both completions of each pair."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, **router_inputs(model, self.run))

    @staticmethod
    def log_probs(output: Any, batch: Batch) -> Tensor:
        """Log-probabilities of the tokens, [2, pairs, length - 1]."""
        found = token_log_probs(output["logits"], batch["labels"])
        return found.view(2, -1, found.shape[-1])

    @staticmethod
    def _judged(margins: Tensor, batch: Batch) -> Sums:
        real = batch["real"].double()
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        count = real.sum()
        return {
            "rewardMargin": torch.stack([(margins.detach().double() * real).sum(), count]),
            "rewardAccuracy": torch.stack([(right * real).sum(), count]),
        }


class Dpo(Pairs):
    """Direct preference optimisation. The reference is the policy at the start of the run."""

    reference: ReferencePolicy

    def attach(self, engine: Any) -> None:
        """Keep the reference, before any checkpoint is loaded."""
        put_off_dropout(engine.model)
        self.reference = ReferencePolicy(engine)

    def losses(self, policy: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """dpo_losses; the margin is β times the difference of log ratios, the paper's implicit rewards."""
        with self.reference.in_force() as frozen:
            reference = self.log_probs(self.passed(frozen, batch), batch).sum(-1)
        return dpo_losses(policy.sum(-1), reference, self.settings.beta, self.settings.label_smoothing)


class Orpo(Pairs):
    """Odds ratio preference optimisation: no reference.

    Each pair weighs the same: its negative log-likelihood is the mean over its own completion, as in the paper's
    formula. TRL averages it over all tokens, prompts included, of the micro batch, so that there the loss depends on
    how a step is cut.
    """

    def losses(self, policy: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """orpo_losses; the margin is λ times the difference of mean log-probabilities."""
        tokens = counted(batch["labels"]).sum(-1).clamp(min=1).view(2, -1)
        means = policy.sum(-1) / tokens
        return orpo_losses(means, self.settings.beta), self.settings.beta * (means[0] - means[1])
