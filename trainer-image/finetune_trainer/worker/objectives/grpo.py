"""GRPO: completions of one prompt are judged against each other (Shao et al. 2024, equations 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune_trainer.worker.objectives.base import Batch, Loss
from finetune_trainer.worker.objectives.online import Online
from finetune_trainer.worker.objectives.policy import as_bits, counted, from_bits, token_log_probs
from finetune_trainer.worker.router import router_inputs, router_loss

_LEAST_SPREAD = 1e-6


def group_advantages(scores: Tensor) -> Tensor:
    """(score − mean) / standard deviation within each group, fp64 [groups, size]; 0 in a group of equal scores.

    The deviation is that of a sample (÷ size − 1). TRL adds 1e-4 to it instead of looking for groups without spread.
    """
    centred = scores - scores.mean(-1, keepdim=True)
    spread = scores.std(-1, keepdim=True)
    flat = spread <= _LEAST_SPREAD * scores.abs().amax(-1, keepdim=True).clamp(min=1)
    return torch.where(flat, 0.0, centred / spread.masked_fill(flat, 1.0))


def clipped_gain(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) (Schulman et al. 2017, equation 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) of each token that is never negative: e^d − d − 1, d = log ref − log π.

    Source: Schulman 2020, "Approximating KL divergence", k3; equation 4 of the GRPO paper.
    """
    difference = reference - policy
    return difference.exp() - difference - 1


class Grpo(Online):
    """Group relative policy optimisation. Unit: a completion.

    As in the paper the loss is the mean over a completion's tokens, then over completions, so that long and short ones
    weigh the same. Dr. GRPO (Liu et al. 2025) shows that this favours long wrong answers; its variant is not offered.
    A batch of n prompts gives n × generations rows. With one iteration the old policy is the policy itself: the ratio
    is 1, with the gradient of the log-probability.
    """

    def judged(self, batch: Batch, scores: Tensor) -> Batch:
        """Adds advantage [rows]; old and reference log-probabilities [rows, longest - 1] where the loss needs them."""
        size = self.settings.generations if len(scores) > 1 else 1
        groups = scores.view(-1, size)
        advantages = group_advantages(groups) if size > 1 else torch.zeros_like(groups)
        found = {**batch, "advantage": as_bits(advantages.flatten())}
        here = self.on_device(batch)
        if self.repeats > 1:
            was_training = self.engine.model.training
            self.engine.model.eval()
            found["old"] = as_bits(self._log_probs(self.engine.model(**_inputs(here))["logits"], here))
            self.engine.model.train(was_training)
        if self.reference is not None:
            with self.reference.in_force() as frozen:
                found["before"] = as_bits(self._log_probs(frozen(**_inputs(here))["logits"], here))
        return found

    def units(self, batch: Batch) -> Tensor:
        """Completions."""
        return batch["real"].sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """−(clipped gain − β · k3) as a mean over each completion's tokens, summed over completions."""
        output = model(**_inputs(batch), **router_inputs(model, self.run))
        policy = self._log_probs(output["logits"], batch)
        mask = counted(batch["labels"])
        ratio = (policy - (from_bits(batch["old"]) if "old" in batch else policy.detach())).exp()
        gain = clipped_gain(ratio, from_bits(batch["advantage"])[:, None], self.settings.clip_range)
        if "before" in batch:
            divergence = k3(policy, from_bits(batch["before"]))
            gain = gain - self.settings.beta * divergence
            self.note("divergence", (divergence * mask).sum(), mask.sum())
        self.note_roll_out(batch)
        clipped = ((ratio - 1).abs() > self.settings.clip_range) & mask
        self.note("clippedShare", clipped.sum(), mask.sum())
        means = (gain * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        return Loss(-(means * batch["real"]).sum(), router_loss(output, model, self.run))

    def _log_probs(self, logits: Tensor, batch: Batch) -> Tensor:
        return token_log_probs(logits, batch["labels"], self.settings.temperature)


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
