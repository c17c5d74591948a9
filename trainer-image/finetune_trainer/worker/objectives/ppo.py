"""PPO: a value head on the policy says what reward to expect (Schulman et al. 2017; for language Ziegler et al. 2019)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_api.failures import FinetuneError
from finetune_trainer.worker.agreement import over_ranks
from finetune_trainer.worker.objectives.base import Batch, Loss
from finetune_trainer.worker.objectives.grpo import clipped_gain
from finetune_trainer.worker.objectives.online import Online
from finetune_trainer.worker.objectives.policy import as_bits, counted, from_bits, token_log_probs
from finetune_trainer.worker.router import router_inputs, router_loss

VALUE_FILE = "value_head.safetensors"
_NAME = "finetune_value_head"


class ValueHead(nn.Linear):
    """The expected reward from a hidden state, fp32. It trains with the model but is no part of its weights.

    The model's own files, checkpoint or artifact, never hold it: only the run needs it, and no library would load it.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """Starts at zero: before any reward is seen, none is expected."""
        super().__init__(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [...] of hidden [..., width]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))[..., 0].float()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is missed either."""


def token_rewards(scores: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor, beta: float) -> Tensor:
    """Rewards [rows, length]: −β (log π − log ref) for each token, and the score beside it at the last one.

    mask: bool [rows, length], the completion's tokens, without a gap. scores: [rows].
    """
    penalty = torch.zeros_like(policy) if reference is None else beta * (policy - reference)
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    last = mask & ~following
    return -penalty * mask + last * scores[:, None].to(policy.dtype)


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimates [rows, length] (Schulman et al. 2016, equation 16), 0 outside mask.

    A completion is over at its last token, whether it ended by itself or at maxNewTokens: no value follows it.
    """
    found = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = (error + discount * decay * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        found[:, t] = next_advantage
    return found


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²) of each token."""
    bounded = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)


class Ppo(Online):
    """Proximal policy optimisation. Unit: a token of a completion.

    The pull to the reference is a part of each token's reward. Advantages are whitened over all tokens of the set, all
    micro batches and ranks together, so that the gradient does not depend on how a step is cut.
    """

    def attach(self, engine: Any) -> None:
        """As for every online objective, then put the value head on the model."""
        super().attach(engine)
        width = engine.model.get_output_embeddings().in_features
        engine.model.add_module(_NAME, ValueHead(width, engine.args.device))

    @property
    def head_of_values(self) -> ValueHead:
        """The value head."""
        return getattr(self.engine.model, _NAME)

    def judged(self, batch: Batch, scores: Tensor) -> Batch:
        """Adds old, values, advantage and returns, all [rows, longest - 1]."""
        here = self.on_device(batch)
        mask = counted(here["labels"])
        model = self.engine.model
        was_training = model.training
        model.eval()
        old, values, _ = self._passed(model, here)
        model.train(was_training)
        reference = None
        if self.reference is not None:
            with self.reference.in_force() as frozen:
                reference = token_log_probs(
                    frozen(**_inputs(here))["logits"], here["labels"], self.settings.temperature
                )
        rewards = token_rewards(scores.to(old.device), old, reference, mask, self.settings.beta)
        settings = self.settings
        advantages = advantages_of(rewards, values, mask, settings.discount, settings.gae_lambda)
        figures = {"old": old, "values": values, "advantage": advantages, "returns": advantages + values}
        if reference is not None:
            figures["before"] = reference
        return {**batch, **{name: as_bits(value) for name, value in figures.items()}}

    def finished(self, window: list[Batch]) -> list[Batch]:
        """Whiten the advantages of the whole set: mean 0 and variance 1 over the tokens of all ranks."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in window:
            values = from_bits(batch["advantage"])[counted(batch["labels"])].double()
            sums += torch.stack(
                [torch.tensor(float(len(values)), dtype=torch.float64), values.sum(), (values**2).sum()]
            )
        count, total, squares = over_ranks(sums.to(self.engine.args.device)).tolist()
        mean = total / max(count, 1)
        deviation = max(squares / max(count, 1) - mean**2, 0) ** 0.5
        scale = 1 / (deviation + 1e-8)
        return [
            {**batch, "advantage": as_bits((from_bits(batch["advantage"]) - mean) * scale * counted(batch["labels"]))}
            for batch in window
        ]

    def units(self, batch: Batch) -> Tensor:
        """Tokens of completions."""
        return counted(batch["labels"]).sum()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """−clipped gain + c · value loss of each token, summed."""
        policy, values, auxiliary = self._passed(model, batch)
        mask = counted(batch["labels"])
        ratio = (policy - from_bits(batch["old"])).exp()
        gain = clipped_gain(ratio, from_bits(batch["advantage"]), self.settings.clip_range)
        worth = value_losses(values, from_bits(batch["values"]), from_bits(batch["returns"]), self.settings.clip_range)
        tokens = mask.sum()
        self.note_roll_out(batch)
        self.note("valueLoss", (worth * mask).sum(), tokens)
        self.note("clippedShare", (((ratio - 1).abs() > self.settings.clip_range) & mask).sum(), tokens)
        if "before" in batch:
            self.note("divergence", ((from_bits(batch["old"]) - from_bits(batch["before"])) * mask).sum(), tokens)
        return Loss(((self.settings.value_coefficient * worth - gain) * mask).sum(), auxiliary)

    def _passed(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log-probabilities of the tokens, values before each of them, router's part), the first two
        [rows, longest - 1]."""
        output = model(**_inputs(batch), output_hidden_states=True, **router_inputs(model, self.run))
        length = batch["labels"].shape[1]
        values = self.head_of_values(output["hidden_states"][-1][:, -length:][:, :-1])
        policy = token_log_probs(output["logits"], batch["labels"], self.settings.temperature)
        return policy, values, router_loss(output, model, self.run)

    # ---- checkpoints

    def own_state(self) -> dict[str, dict[str, Tensor]]:
        """The completions in use, and the value head."""
        files = super().own_state()
        with self._whole():
            if self.engine.supervision.ranks.is_main:
                head = self.head_of_values.named_parameters()
                files[VALUE_FILE] = {name: p.detach().float().clone() for name, p in head}
        return files

    def load_state(self, folder: Path) -> None:
        """Both again; raises CheckpointInvalid if one is missing or does not fit."""
        super().load_state(folder)
        try:
            found = load_file(folder / VALUE_FILE)
            with self._whole(), torch.no_grad():
                for name, p in self.head_of_values.named_parameters():
                    p.copy_(found[name])
        except (OSError, KeyError, RuntimeError) as error:
            raise FinetuneError(
                f"The restored checkpoint cannot be used: its {VALUE_FILE} does not fit ({error}).",
                failure_class="CheckpointInvalid",
            ) from error

    def _whole(self) -> AbstractContextManager[Any]:
        """The head's weights whole on every rank, and what rank 0 changes kept: they are sharded under ZeRO-3."""
        if self.engine.supervision.zero_stage != 3:
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(list(self.head_of_values.parameters()), modifier_rank=0)


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
