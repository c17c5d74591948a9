"""The engine: the library's trainer with our seams. No training loop of our own.

What is minimised comes from an `Objective`; the engine makes it exact, supervised and resumable. Its seams, each
checked by a contract test against the pinned library:

get_train_dataloader, create_scheduler, _load_optimizer_and_scheduler    before the first step
get_batch_samples, _get_num_items_in_batch                               each optimizer step
training_step, compute_loss, _clip_grad_norm                             each micro batch or step
log, _save_checkpoint, train                                             at a step's boundary, and at the end
_evaluate, evaluation_loop, get_eval_dataloader                          evaluation
_load_from_checkpoint, _load_rng_state, _init_training_state,
_run_epoch, _issue_warnings_after_load                                   resume
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from finetune_api.failures import FinetuneError
from finetune_api.guards import RollbackReason
from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.worker import resume
from finetune_trainer.worker.agreement import Agreement, over_ranks
from finetune_trainer.worker.batches import EpochLoader, Split
from finetune_trainer.worker.checkpoints import Checkpoints, require_finite, trained_weights
from finetune_trainer.worker.evaluate.best import keep_weights
from finetune_trainer.worker.faults import Stopped
from finetune_trainer.worker.guards import LossAlarm, lower_rates, set_rates
from finetune_trainer.worker.objectives.base import Batch, Objective, Sums
from finetune_trainer.worker.quantization import only_measured
from finetune_trainer.worker.supervision import Supervision
from finetune_trainer.worker.tuning.prompts import OWN_STATE, load_own_state, needs_own_state, own_state
from finetune_trainer.worker.zero import assert_zero


class Engine(Trainer):
    """Supervision, exact losses, agreed stops, safe checkpoints and unit-weighted evaluation for any objective."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        supervision: Supervision,
        objective: Objective,
        split: Split,
        train: Sequence[Any],
        validation: Sequence[Any],
        **kwargs: Any,
    ) -> None:
        """args and kwargs go to the library's trainer; train and validation are this run's encoded records."""
        self.supervision = supervision
        self.objective = objective
        self.split = split
        self.agreement = Agreement()
        self.save_is_optional = False
        """Whether the next save may be left out if the one before is still being written."""
        self._saved_step = 0
        self._records = train
        self._held_out = validation
        with only_measured(kwargs["model"]) if supervision.total_steps == 0 else nullcontext():
            super().__init__(*args, train_dataset=train, eval_dataset=validation or None, **kwargs)
        self.checkpoints = Checkpoints(Path(self.args.output_dir), supervision)
        objective.attach(self)
        # The library seeds all ranks alike, and their dropout and noise would repeat each other. All that has to be alike
        # is made by now; rank 0 draws as a lone process does.
        if supervision.ranks.rank > 0:
            resume.derive_random_state(self.args.seed, 0, supervision.ranks.rank)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The library's training; at its end, whatever it is, no checkpoint is being written any more."""
        with self.checkpoints.running():
            return super().train(*args, **kwargs)

    # ---- before the first step

    def get_train_dataloader(self) -> EpochLoader:
        """Micro batches in an order that depends on the seed only; not prepared by accelerate, which repeats records."""
        return self.loader(self._records, self.split, seed=self.args.seed, repeats=self.objective.repeats)

    def loader(self, items: Sequence[Any], split: Split, *, seed: int | None, repeats: int = 1) -> EpochLoader:
        """Batches of the objective; seed None keeps the items' own order. repeats: how often each step's come."""
        return EpochLoader(
            items,
            split,
            length=self.objective.length,
            collate=self.objective.collate,
            seed=seed,
            repeats=repeats,
            pin=self.args.dataloader_pin_memory,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The library's scheduler with the guards' rates; proves that ZeRO is in force where it was planned."""
        if self.supervision.zero_stage > 0:
            assert_zero(self.accelerator._models[-1], self.supervision.zero_stage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        lower_rates(scheduler, self.supervision.guards)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The library's load, then the rates of plan and guards in place of the stored ones, and the objective's state."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            resume.plan_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate)
            set_rates(self.lr_scheduler)
            self.objective.load_state(Path(checkpoint))

    # ---- each optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The step's micro batches, after the objective's roll-out, and their units over all ranks."""
        self.supervision.heartbeat.doing(Activity.READING_DATA)
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.supervision.heartbeat.doing(Activity.STEPPING)
        if batches:
            try:
                batches = self.objective.roll_out(self, batches)
            except Stopped:
                if self.state.global_step not in (self._saved_step, self._initial_global_step):
                    self._save_checkpoint(self.model)
                raise
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Units of the whole step over all micro batches and ranks: fp64 scalar, at least 1."""
        counts = [int(self.objective.units(batch)) for batch in batch_samples]
        sums = torch.tensor([sum(counts), sum(map(bool, counts))], dtype=torch.float64, device=device)
        with self.supervision.heartbeat.during(Activity.WAITING):
            units, self._filled = over_ranks(sums).clamp(min=1)
        return units

    # ---- each micro batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass, with a sign of life."""
        self.supervision.heartbeat.beat()
        self.agreement.tokens += self.objective.tokens(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; before the last backward pass of a step all ranks agree whether it is finite and whether to stop.

        The optimizer steps after that pass (under DeepSpeed inside it), so a non-finite loss never reaches a weight.
        """
        found = self.objective.loss_sum(model, inputs)
        # Ranks' gradients are averaged, so that a sum over ranks has to be multiplied by their number.
        loss = found.total * (self.args.world_size / num_items_in_batch).to(found.total.dtype)
        if found.auxiliary is not None:
            # A mean over the micro batches of all ranks that hold records: the row that stands for none routes too.
            some = (self.objective.units(inputs) > 0).to(found.auxiliary)
            loss = loss + found.auxiliary * some * (self.args.world_size / self._filled).to(loss.dtype)
        self.agreement.note_loss(loss)
        if self.accelerator.sync_gradients:
            self._agree()
        return (loss, None) if return_outputs else loss

    def agree_on_stop(self) -> None:
        """Between steps: all ranks learn whether any was asked to stop."""
        self.agreement.reach(
            stop=self.agreement.stop or self.supervision.stop_asked(), save=False, device=self.args.device
        )

    def look_for_stop(self) -> None:
        """Within a measurement or a roll-out, between two batches: a sign of life.

        Raises Stopped on all ranks if any was asked to stop. Every rank calls it as often.
        """
        self.supervision.heartbeat.beat()
        self.agree_on_stop()
        if self.agreement.stop:
            raise Stopped(f"Stopped as asked after step {self.state.global_step}.")

    def _agree(self) -> None:
        control = self.supervision
        minutes_are_up = control.ranks.is_main and control.save_policy.minutes_are_up()
        with control.heartbeat.during(Activity.WAITING):
            self.agreement.reach(stop=control.stop_asked(), save=minutes_are_up, device=self.args.device)
        control.carry.tokens += self.agreement.step_tokens
        if self.agreement.non_finite:
            raise self._non_finite(
                f"The loss of step {self.state.global_step + 1} is not finite; nothing of it was kept. Lower "
                "hyperparameters.learningRate or look for broken records."
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The clipped gradient's norm; a non-finite one ends the run, but in FP16, where the scaler skips the step."""
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16 and norm is not None and not math.isfinite(float(norm)):
            raise self._non_finite(
                f"The gradient of step {self.state.global_step + 1} is not finite. Lower hyperparameters.learningRate."
            )
        return norm

    def _non_finite(self, message: str) -> LossAlarm:
        return LossAlarm(message, reason=RollbackReason.NON_FINITE, onset_step=self.state.global_step + 1)

    # ---- at a step's boundary

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log, with the objective's own figures of the step over all ranks."""
        if "loss" in logs and self.objective.noted:
            logs.update(reduce_sums(self.objective.noted, self.args.device))
            self.objective.noted.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint in the library's layout, complete on disk before its marker; never one that is not finite.

        Training waits for the copy to host memory only, and for the checkpoint before, where this one must not be left
        out.
        """
        may_be_left_out, self.save_is_optional = self.save_is_optional, False
        with self.supervision.heartbeat.during(Activity.SAVING), self.supervision.heartbeat.long_phase():
            if may_be_left_out and self.agreement.any_of(self.checkpoints.is_writing(), self.args.device):
                self.checkpoints.skip(self.state.global_step)
                return
            require_finite(self._trained_weights)
            with self.checkpoints.taking(self.state, self._keep_if_best()) as (snapshot, folder):
                super()._save_checkpoint(model, trial)
                for name, tensors in self.objective.own_state().items():
                    snapshot.hold_tensors(tensors, folder / name)
                if self.supervision.ranks.is_main and needs_own_state(self.model):
                    snapshot.hold_tensors(own_state(self.model), folder / OWN_STATE)
        self._saved_step = self.state.global_step

    @cached_property
    def _trained_weights(self) -> dict[str, nn.Parameter]:
        return trained_weights(self.model)

    def _keep_if_best(self) -> Callable[[Path], None] | None:
        """The weights of the best step stay on the disk, whatever becomes of its checkpoint there."""
        best = self.supervision.carry.best_steps[:1] == [self.state.global_step]
        return partial(keep_weights, supervision=self.supervision) if best else None

    # ---- evaluation

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        """The evaluation of a step. One that a stop cuts off is caught up on resume, from the checkpoint made now."""
        try:
            with self.supervision.heartbeat.during(Activity.EVALUATING):
                return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Stopped:
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            self.save_is_optional = False
            return {}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        """The held-out records, each exactly once over all ranks."""
        split = replace(self.split, accumulation=max(1, len(self._held_out)))
        return self.loader(self._held_out, split, seed=None)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The objective's metrics over the whole set: sums of each batch, added over ranks; no logits leave a batch."""
        sums = self.measure(dataloader)
        means = reduce_sums(sums, self.args.device)
        if not math.isfinite(means["loss"]):
            raise FinetuneError(
                f"The held-out loss at step {self.state.global_step} is not finite. Look for broken records or weights, "
                "or lower hyperparameters.learningRate.",
                failure_class="NonFiniteLoss",
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.objective.metrics(means).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self._held_out))

    @torch.no_grad()
    def measure(self, dataloader: Any) -> Sums:
        """This rank's sums over the batches of dataloader, in evaluation mode."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        sums: Sums = {}
        for inputs in dataloader:
            self.look_for_stop()
            # The library puts autocast round the trained model's own forward pass only, not round its bare base.
            with self.accelerator.autocast():
                found = self.objective.measure(model, self._prepare_inputs(inputs))
            for name, pair in found.items():
                sums[name] = sums[name] + pair if name in sums else pair
        model.train(was_training)
        return sums

    # ---- resume

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The library's load; a soft prompt with a network behind it is loaded whole, which the library cannot."""
        if needs_own_state(self.model):
            load_own_state(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The library's load; random states of their own where processes or GPUs are others than the checkpoint's."""
        ranks = self.supervision.ranks
        if checkpoint is None or resume.random_state_fits(Path(checkpoint), ranks):
            super()._load_rng_state(checkpoint)
        else:
            resume.derive_random_state(self.args.seed, self.state.global_step, ranks.rank)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Where to go on; a run that has made all its steps makes no more (the library would make one).

        Evaluations come as often as this run plans; the library would keep the checkpoint's interval.
        """
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, steps)

    def _run_epoch(self, **arguments: Any) -> None:
        """An epoch; none where an evaluation that was caught up on resume has ended the run."""
        if not self.control.should_training_stop:
            super()._run_epoch(**arguments)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Missing or unexpected weights in a checkpoint are an error, not a warning."""
        resume.require_complete(self.model, load_result)


def reduce_sums(sums: Sums, device: torch.device) -> dict[str, float]:
    """The mean of each sum over all ranks; every rank calls it with the same names."""
    names = sorted(sums)
    stacked = over_ranks(torch.stack([sums[name].double().to(device) for name in names]))
    return {name: total / max(count, 1) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}
