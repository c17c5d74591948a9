"""What happens at the boundary of an optimizer step: decide on saving and stopping, tell the progress."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.documents import Stage
from finetune_api.guards import RollbackReason
from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.worker.evaluate.best import BestPolicy, keep_weights
from finetune_trainer.worker.evaluate.measuring import Measurer, logged_metrics
from finetune_trainer.worker.guards import LossAlarm, LossGuard
from finetune_trainer.worker.tuning import as_base

# The FP16 scaler halves its scale at each skipped step, from 65,536 down: after this many it has given up.
MAX_SKIPPED_STEPS = 20


class StepBoundary(TrainerCallback):
    """Steers the library's loop from outside: base measured first, saves, stops, best step, loss guard, progress."""

    def __init__(self, measurer: Measurer, best: BestPolicy, guard: LossGuard) -> None:
        """measurer measures the untuned model before the first step."""
        self.engine: Any = None
        self.measurer = measurer
        self.best = best
        self.guard = guard
        self._started = self._lap = time.monotonic()
        self._step_seconds = 0.0
        self._first_step = 0
        self._tokens_before = 0

    def attach(self, engine: Any) -> None:
        """Learn the engine; callbacks are made before it."""
        self.engine = engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untuned model once per run; catch up an evaluation that a stop cut off."""
        supervision = self.engine.supervision
        carry, progress = supervision.carry, supervision.progress
        if carry.base is None:
            self.measure_base()
        elif _evaluation_is_due(args, state):
            supervision.heartbeat.doing(Activity.EVALUATING)
            self.engine.evaluate()
            if carry.best_steps[:1] == [state.global_step]:
                # What the save does for others: the library saves nothing before the first step.
                keep_weights(supervision.work.resume, supervision)
        if carry.stopped_early:
            control.should_training_stop = True
        self.guard.recall(state.log_history)
        progress.stage(Stage.TRAINING)
        supervision.heartbeat.doing(Activity.STEPPING)
        self._started = self._lap = time.monotonic()
        self._first_step = state.global_step
        self._tokens_before = carry.tokens

    def measure_base(self) -> None:
        """The untuned model is measured, and its results travel with the run from now on."""
        supervision = self.engine.supervision
        supervision.progress.stage(Stage.EVALUATING)
        supervision.heartbeat.doing(Activity.EVALUATING)
        with as_base(self.engine.model):
            known = None if self.engine.eval_dataset is None else logged_metrics(self.engine.evaluate())
            supervision.carry.base = asdict(self.measurer.measure(self.engine, known))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save at the end, on a stop, each N steps or N minutes; after a stop nothing else happens."""
        self.engine.checkpoints.raise_failure()
        self._count_skipped(state)
        supervision, agreement = self.engine.supervision, self.engine.agreement
        now = time.monotonic()
        self._step_seconds = now - self._lap
        supervision.carry.train_seconds += self._step_seconds
        self._lap = now
        needed = agreement.stop or state.global_step >= supervision.total_steps
        due = agreement.save or supervision.save_policy.step_is_due(state.global_step)
        control.should_save, self.engine.save_is_optional = needed or due, due and not needed
        if agreement.stop:
            control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A step that is the best so far is saved; too many in a row that are not end the run, if it asks for that."""
        if state.global_step == 0 or metrics is None:
            return
        carry = self.engine.supervision.carry
        if self.best.judge(carry, state.global_step, logged_metrics(metrics)):
            control.should_save, self.engine.save_is_optional = True, False
        if carry.stopped_early:
            control.should_training_stop = control.should_save = True
            self.engine.save_is_optional = False
        self._lap = time.monotonic()  # an evaluation is no part of the next step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A save is no part of the next step."""
        self._lap = time.monotonic()

    def _count_skipped(self, state: TrainerState) -> None:
        carry = self.engine.supervision.carry
        carry.skipped_steps = carry.skipped_steps + 1 if self.engine.accelerator.optimizer_step_was_skipped else 0
        if carry.skipped_steps > MAX_SKIPPED_STEPS:
            raise LossAlarm(
                f"{carry.skipped_steps} steps in a row, up to step {state.global_step}, had a gradient too large for FP16. "
                "Use precision BF16 or lower hyperparameters.learningRate.",
                reason=RollbackReason.NON_FINITE,
                onset_step=state.global_step - carry.skipped_steps + 1,
                field="spec.hyperparameters.precision",
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take over the step's figures into the progress. Raises LossAlarm before anything of the step is saved."""
        logs = logs or {}
        progress = self.engine.supervision.progress
        if "eval_loss" in logs:
            progress.update(eval_loss=logs["eval_loss"])
        if "loss" not in logs:
            return
        if self._step_seconds > 0:
            state.log_history[-1]["tokens_per_second"] = self.engine.agreement.step_tokens / self._step_seconds
        done = state.global_step - self._first_step
        elapsed = time.monotonic() - self._started
        tokens = self.engine.supervision.carry.tokens - self._tokens_before
        progress.update(
            step=state.global_step,
            epoch=float(state.epoch or 0),
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs["learning_rate"]),
            tokens_per_second=tokens / elapsed if elapsed > 0 else None,
            eta_seconds=round((state.max_steps - state.global_step) * elapsed / done) if done else None,
        )
        self.guard.see(state.global_step, float(logs["loss"]))


def _evaluation_is_due(args: TrainingArguments, state: TrainerState) -> bool:
    if args.eval_strategy != "steps" or not state.global_step or state.global_step % int(args.eval_steps):
        return False
    return not any("eval_loss" in e and e.get("step") == state.global_step for e in state.log_history)
