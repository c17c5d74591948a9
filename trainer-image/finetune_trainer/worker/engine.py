"""The engine: a library trainer with our seams. No training loop of our own.

`EngineMixin` stands first in the method resolution order of every objective (`class Dpo(EngineMixin, DPOTrainer)`).
Its seams, each checked by a contract test against the pinned library:

get_train_dataloader, create_scheduler, _load_optimizer_and_scheduler    before the first step
training_step, compute_loss, _clip_grad_norm                             each micro batch or step
_save_checkpoint                                                         at a step's boundary
evaluation_loop, get_eval_dataloader                                     evaluation
_init_training_state, _issue_warnings_after_load                         resume
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from finetune_api.failures import FinetuneError
from finetune_trainer.data import EncodedExample
from finetune_trainer.worker import checkpoints
from finetune_trainer.worker.agreement import Agreement
from finetune_trainer.worker.batches import EpochLoader, Split
from finetune_trainer.worker.loss import causal_loss, counted_tokens, next_token_loss_sum
from finetune_trainer.worker.supervision import Supervision
from finetune_trainer.worker.zero import assert_zero

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin stands before whichever trainer it is mixed with


class EngineMixin(_AnyTrainer):
    """Supervision, exact losses, agreed stops, safe checkpoints and token-weighted evaluation for any trainer."""

    def __init__(
        self,
        *args: Any,
        supervision: Supervision,
        split: Split,
        train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        **kwargs: Any,
    ) -> None:
        """args and kwargs go to the library's trainer; train and validation are this run's encoded records."""
        self.supervision = supervision
        self.split = split
        self.agreement = Agreement()
        self._records = train
        self._held_out = validation
        super().__init__(*args, train_dataset=train, eval_dataset=validation or None, **kwargs)

    # ---- before the first step

    def get_train_dataloader(self) -> EpochLoader:
        """Micro batches in an order that depends on the seed only; not prepared by accelerate, which repeats records."""
        return EpochLoader(self._records, self.split, seed=self.args.seed, pin=self.args.dataloader_pin_memory)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The library's scheduler; proves on the way that ZeRO is in force where it was planned."""
        if self.supervision.zero_stage > 0:
            assert_zero(self.accelerator._models[-1], self.supervision.zero_stage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The library's load, then the planned learning rate in place of the stored one."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            checkpoints.plan_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate)

    # ---- each micro batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass, with a sign of life."""
        self.supervision.heartbeat.beat()
        self.agreement.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; before the last backward pass of a step all ranks agree whether it is finite and whether to stop.

        The optimizer steps after that pass (under DeepSpeed inside it), so a non-finite loss never reaches a weight.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.agreement.note_loss(loss)
            if self.accelerator.sync_gradients:
                self._agree()
        return (loss, outputs) if return_outputs else loss

    def agree_on_stop(self) -> None:
        """Between steps: all ranks learn whether any was asked to stop."""
        self.agreement.reach(
            stop=self.agreement.stop or self.supervision.stop_asked(), save=False, device=self.args.device
        )

    def _agree(self) -> None:
        control = self.supervision
        minutes_are_up = control.ranks.is_main and control.save_policy.minutes_are_up()
        self.agreement.reach(stop=control.stop_asked(), save=minutes_are_up, device=self.args.device)
        control.carry.tokens += self.agreement.step_tokens
        if self.agreement.non_finite:
            raise FinetuneError(
                f"The loss of step {self.state.global_step + 1} is not finite; nothing of it was kept. Lower "
                "hyperparameters.learningRate or look for broken records.",
                failure_class="NonFiniteLoss",
                field="spec.hyperparameters.learningRate",
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The clipped gradient's norm; a non-finite one ends the run, but in FP16, where the scaler skips the step."""
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16 and norm is not None and not math.isfinite(float(norm)):
            raise FinetuneError(
                f"The gradient of step {self.state.global_step + 1} is not finite. Lower hyperparameters.learningRate.",
                failure_class="NonFiniteLoss",
                field="spec.hyperparameters.learningRate",
            )
        return norm

    # ---- at a step's boundary

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint in the library's layout, complete on disk before its marker; never one that is not finite."""
        checkpoints.require_finite(self.model)
        with self.supervision.heartbeat.long_phase():
            super()._save_checkpoint(model, trial)
            checkpoints.commit(Path(self.args.output_dir), self.state, self.supervision)

    # ---- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        """The held-out records, each exactly once over all ranks."""
        split = replace(self.split, accumulation=max(1, len(self._held_out)))
        return EpochLoader(self._held_out, split, seed=None, pin=self.args.dataloader_pin_memory)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Token-weighted loss over the whole set: two sums per rank, added over ranks; logits never leave a batch."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            self.supervision.heartbeat.beat()
            total += self._loss_and_count(model, self._prepare_inputs(inputs))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        model.train()
        loss, tokens = (float(value) for value in total)
        if not math.isfinite(loss):
            raise FinetuneError(
                f"The held-out loss at step {self.state.global_step} is not finite. Look for broken records or weights, "
                "or lower hyperparameters.learningRate.",
                failure_class="NonFiniteLoss",
            )
        metrics = {f"{metric_key_prefix}_loss": loss / max(tokens, 1), f"{metric_key_prefix}_tokens": int(tokens)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self._held_out))

    @torch.no_grad()
    def _loss_and_count(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():
            logits = model(**inputs)["logits"]
        return torch.stack([next_token_loss_sum(logits, labels), counted_tokens(labels)]).double()

    # ---- resume

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Where to go on; a run that has made all its steps makes no more (the library would make one)."""
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, steps)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Missing or unexpected weights in a checkpoint are an error, not a warning."""
        checkpoints.require_complete(self.model, load_result)


class Supervised(EngineMixin, Trainer):
    """Supervised fine-tuning of a causal model by transformers.Trainer with our loss."""

    def __init__(self, **kwargs: Any) -> None:
        """See EngineMixin."""
        super().__init__(compute_loss_func=causal_loss, **kwargs)
