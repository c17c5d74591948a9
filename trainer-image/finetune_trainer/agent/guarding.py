"""What the guards answer to a failure of the workers: start again with changed settings, or let it stand. Pure.

The loop of such answers ends: each adds a rollback, of which there are MAX_ROLLBACKS, or halves the micro batch, which
ends at 1. Both travel with the run, so that a further attempt does not begin to count anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.documents import Stage
from finetune_api.guards import MAX_MICRO_BATCH_DIVISOR, MAX_ROLLBACKS, MAX_STEP, GuardState, Rollback, RollbackReason
from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunFile
from finetune_trainer.agent.ending import Alarm, End

_NO_MEMORY = "OutOfGpuMemory"
_LOSS_CLASSES = ("LossSpike", "NonFiniteLoss")
ANSWERED = (_NO_MEMORY, *_LOSS_CLASSES)
"""What the guards may have an answer to. Of several nodes only node 0 gives it, as it alone keeps their state."""
# A batch is on the GPU only after these.
_BEFORE_A_BATCH = (Stage.STARTING, Stage.LOADING)


@dataclass(frozen=True)
class Change:
    """Start again with these guards. to_step: only checkpoints up to this step count from now on; None: all do."""

    guards: GuardState
    to_step: int | None
    message: str


def answer(guards: GuardState, end: End, run: RunFile, *, stage: Stage, step: int) -> Change | End:
    """What follows from the end of the workers: a change, or how the attempt ends.

    guards: those that the workers ran with. stage, step: where they were, as far as the agent knows.
    """
    if end.outcome == _NO_MEMORY:
        return _smaller(guards, end, run, stage)
    if end.outcome in _LOSS_CLASSES and run.guards.loss_spike is LossSpikeGuard.ROLLBACK:
        alarm = end.alarm or (Alarm(RollbackReason.NON_FINITE, step) if step else None)
        return _back(guards, end, run, alarm) if alarm is not None else end
    return end


def farthest_rollback(run: RunFile) -> int:
    """How many steps before the newest one a rollback may have to go back to; 0 with the guard off."""
    settings = run.guards
    if settings.loss_spike is LossSpikeGuard.OFF:
        return 0
    return settings.rollback_steps + max(2 * settings.window, settings.spike_steps)


def collateral(end: End) -> End:
    """How a node after the first ends: what node 0 has to answer is left to it."""
    if end.outcome not in ANSWERED:
        return end
    return End("CollectiveFailed", f"Node 0 decides what follows. {end.message}", end.field)


def _smaller(guards: GuardState, end: End, run: RunFile, stage: Stage) -> Change | End:
    planned = run.hyperparameters.micro_batch_size, run.hyperparameters.gradient_accumulation
    size, _ = guards.split(*planned)
    if stage in _BEFORE_A_BATCH:
        hint = "No batch was on the GPU yet, so a smaller one does not help: choose a larger pool or a smaller model."
        return replace(end, message=f"{end.message} {hint}", field="spec.resources.pool")
    divisor = guards.micro_batch_divisor * 2
    while divisor <= MAX_MICRO_BATCH_DIVISOR:
        changed = guards.model_copy(update={"micro_batch_divisor": divisor})
        smaller, accumulation = changed.split(*planned)
        if smaller < size:
            return Change(
                changed,
                None,
                f"The GPU ran out of memory with micro batch {size}: now {smaller}, and gradients are accumulated over "
                f"{accumulation} passes. The records of a step stay the same.",
            )
        divisor *= 2
    hint = f"The micro batch is {size} already: lower hyperparameters.maxSequenceLength or choose a larger pool."
    return replace(end, message=f"{end.message} {hint}", field="spec.hyperparameters.maxSequenceLength")


def _back(guards: GuardState, end: End, run: RunFile, alarm: Alarm) -> Change | End:
    if len(guards.rollbacks) == MAX_ROLLBACKS:
        history = "; ".join(_told(found) for found in guards.rollbacks)
        return replace(end, message=f"{end.message} The run had gone back {MAX_ROLLBACKS} times: {history}.")
    settings = run.guards
    rollback = Rollback(
        reason=alarm.reason,
        onset_step=alarm.onset_step,
        to_step=max(0, alarm.onset_step - settings.rollback_steps),
        until_step=min(alarm.onset_step + settings.lowered_steps, MAX_STEP),
        # Where an earlier rollback has lowered the rate already, it was not enough.
        factor=guards.learning_rate_factor(alarm.onset_step) * settings.rate_factor,
    )
    changed = guards.model_copy(update={"rollbacks": (*guards.rollbacks, rollback)})
    return Change(
        changed,
        rollback.to_step,
        f"{end.message} Rollback {len(changed.rollbacks)} of {MAX_ROLLBACKS}: {_told(rollback)}.",
    )


def _told(rollback: Rollback) -> str:
    return (
        f"{rollback.reason.value} from step {rollback.onset_step} on, back to step {rollback.to_step} or before, "
        f"{rollback.factor:.3g} of the planned learning rate up to step {rollback.until_step}"
    )
