"""KTO: single completions, each judged desirable or not (Ethayarajh et al. 2024, equation 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunPreference
from finetune_trainer.data.kinds import EncodedJudged
from finetune_trainer.worker.agreement import over_ranks
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.objectives.base import Batch, Loss, Objective, Sums
from finetune_trainer.worker.objectives.policy import ReferencePolicy, put_off_dropout, token_log_probs
from finetune_trainer.worker.objectives.step_records import StepRecord, step_records
from finetune_trainer.worker.padding import pad_arrays
from finetune_trainer.worker.router import router_inputs, router_loss


def kto_losses(ratios: Tensor, desirable: Tensor, divergence: Tensor, settings: RunPreference) -> Tensor:
    """Losses [records]: λD (1 − σ(β(r − z))) of desirable records, λU (1 − σ(β(z − r))) of the others.

    ratios: r, the log ratio of policy and reference summed over the completion. desirable: [records], 1 or 0.
    divergence: z, the estimate of KL(policy ‖ reference), a constant to the gradient.
    """
    sign = 2.0 * desirable - 1.0
    weights = torch.where(desirable > 0, settings.desirable_weight, settings.undesirable_weight)
    return weights * (1 - torch.sigmoid(settings.beta * sign * (ratios - divergence)))


class Kto(Objective):
    """Kahneman-Tversky optimisation. Unit: a record. The reference is the policy at the start of the run.

    z is the mean log ratio of each prompt with the next record's completion, clamped at 0, over the whole optimizer
    step of all ranks. It is worked out before the first micro batch, from the records in an order that does not depend
    on how the step is cut, so that the gradient does not either. Held-out losses take z = 0: their mean is one over
    records, comparable between steps. TRL takes z for each micro batch in both.
    """

    reference: ReferencePolicy
    divergence: Tensor

    @property
    def settings(self) -> RunPreference:
        """The preference settings of the run."""
        assert self.run.objective.preference is not None  # the planner fills it for this objective
        return self.run.objective.preference

    def length(self, item: EncodedJudged) -> int:
        """Tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[EncodedJudged]) -> Batch:
        """input_ids, attention_mask, labels [records, longest]; prompt, desirable and real (0 for padding) [records]."""
        ids, mask = pad_arrays([item.input_ids for item in items], 0)
        labels, _ = pad_arrays([item.labels for item in items], IGNORED)
        labels[:, 0] = IGNORED
        if not items:
            labels[:] = IGNORED
        rows = [(item.prompt, item.desirable, 1) for item in items] or [(0, 0, 0)]
        prompt, desirable, real = torch.tensor(rows).unbind(1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prompt": prompt,
            "desirable": desirable,
            "real": real,
        }

    def attach(self, engine: Any) -> None:
        """Keep the reference, before any checkpoint is loaded. Raises InvalidSpec for steps of one record."""
        if self.run.global_batch_size < 2:
            raise FinetuneError(
                "KTO compares each record with another of its optimizer step, and the step has only one. "
                "Set hyperparameters.globalBatchSize to 2 or more.",
                failure_class="InvalidSpec",
                field="spec.hyperparameters.globalBatchSize",
            )
        put_off_dropout(engine.model)
        self.reference = ReferencePolicy(engine)
        self.divergence = torch.zeros((), device=engine.args.device)

    def roll_out(self, engine: Any, batches: list[Batch]) -> list[Batch]:
        """The same batches; the divergence of the step is worked out on the way."""
        records = step_records(batches, engine.args.device)
        # Nothing random: on resume the library restores the random state after this, not before.
        was_training = engine.model.training
        engine.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=engine.args.device)
        for number in range(len(batches)):
            own = [k for k, record in enumerate(records) if record.own and record.batch == number]
            batch = {name: value.to(engine.args.device) for name, value in self._mismatched(records, own).items()}
            with torch.no_grad():
                total += (self._ratios(engine.model, batch)[0] * batch["real"]).sum().double()
        engine.model.train(was_training)
        over_ranks(total)
        # The only record of a last, partial step has no other completion beside it.
        mean = total / len(records) if len(records) > 1 else torch.zeros_like(total)
        self.divergence = mean.clamp(min=0).float()
        return batches

    def _mismatched(self, records: Sequence[StepRecord], own: Sequence[int]) -> Batch:
        """The prompts of own with the completions of the records behind them, cut at the front to what a record may
        have."""
        items = []
        for k in own:
            mine, other = records[k], records[(k + 1) % len(records)]
            completion, labels = other.ids[other.prompt :], other.labels[other.prompt :]
            room = max(1, self.run.hyperparameters.max_sequence_length - len(completion))
            prompt = mine.ids[: mine.prompt][-room:]
            ids = torch.cat([prompt, completion]).numpy()
            masked = torch.cat([torch.full_like(prompt, IGNORED), labels]).numpy()
            items.append(EncodedJudged(ids, masked, len(prompt), 0))
        return self.collate(items)

    def units(self, batch: Batch) -> Tensor:
        """Records."""
        return batch["real"].sum()

    def _ratios(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The log ratio of policy and reference of each completion, fp32 [records]; the router's part of the loss."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with self.reference.in_force() as frozen:
            reference = token_log_probs(frozen(**inputs)["logits"], batch["labels"]).sum(-1)
        output = model(**inputs, **router_inputs(model, self.run))
        policy = token_log_probs(output["logits"], batch["labels"]).sum(-1)
        return policy - reference, router_loss(output, model, self.run)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Loss:
        """The records' losses, summed, with the divergence of this step."""
        ratios, auxiliary = self._ratios(model, batch)
        for name, (total, count) in self._rewards(ratios, batch).items():
            self.note(name, total, count)
        self.note("divergence", self.divergence * batch["real"].sum(), batch["real"].sum())
        losses = kto_losses(ratios, batch["desirable"], self.divergence, self.settings)
        return Loss((losses * batch["real"]).sum(), auxiliary)

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """loss with z = 0, and the rewards of desirable and undesirable completions."""
        ratios, _ = self._ratios(model, batch)
        losses = kto_losses(ratios, batch["desirable"], torch.zeros_like(self.divergence), self.settings)
        loss = torch.stack([(losses * batch["real"]).sum(), batch["real"].sum()]).double()
        return {"loss": loss, **self._rewards(ratios, batch)}

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """The means, and rewardMargin: how much more reward desirable completions have than undesirable ones."""
        margin = means["desirableReward"] - means["undesirableReward"]
        return {**means, "rewardMargin": margin}

    def _rewards(self, ratios: Tensor, batch: Batch) -> Sums:
        rewards = self.settings.beta * ratios.detach().double()
        good = (batch["desirable"] * batch["real"]).double()
        bad = ((1 - batch["desirable"]) * batch["real"]).double()
        return {
            "desirableReward": torch.stack([(rewards * good).sum(), good.sum()]),
            "undesirableReward": torch.stack([(rewards * bad).sum(), bad.sum()]),
        }
