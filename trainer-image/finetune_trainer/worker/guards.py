"""The guards in a worker: what a loss that goes wrong looks like, and the settings that earlier alarms have changed.

Robust figures, because a false alarm costs more than a late one: medians and upper quantiles of a window, and several
losses in a row. Were all losses drawn alike, from any distribution, eight in a row would lie above the 95 % quantile of
64 others once in 7 × 10^7 steps; the rise that is asked for beside it makes that rarer still.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.guards import GuardState, RollbackReason
from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunFile, RunGuards

_DEVIATIONS = 4.0
# The median absolute deviation of a normal distribution is its standard deviation divided by this.
_MAD_TO_DEVIATION = 1.4826
_UPPER_QUANTILE = 0.95
# In the unit of the loss (nats, mostly): what is less does no harm, however small the loss was before.
_LEAST_RISE = 0.1


class LossAlarm(FinetuneError):
    """The training loss has gone wrong. onset_step: the first step whose loss was too high; nothing after it is kept."""

    def __init__(self, message: str, *, reason: RollbackReason, onset_step: int, field: str | None = None) -> None:
        failure_class = "NonFiniteLoss" if reason is RollbackReason.NON_FINITE else "LossSpike"
        super().__init__(message, failure_class=failure_class, field=field or "spec.hyperparameters.learningRate")
        self.reason = reason
        self.onset_step = onset_step


@dataclass(frozen=True)
class Finding:
    """What the detector found. before: the loss's level until then. now: its level since onset_step."""

    reason: RollbackReason
    onset_step: int
    before: float
    now: float


@dataclass
class LossWatch:
    """Sees the loss of each optimizer step, in the order of steps; what it knows follows from those losses alone.

    A spike: `spike_steps` losses in a row, each above the limit of the last `window` losses before them (of half as many
    at the start). The limit is the highest of their 95 % quantile, of their median plus 4 deviations (by the median
    absolute deviation), and of the median plus the rise. Onset: the first of these losses.

    A plateau: the losses are cut into blocks of `window`. Two blocks in a row have medians above both the 95 % quantile
    of the block with the lowest median and that median plus the rise. Onset: the first step of the two blocks. So a loss
    that does not fall is none: only one that has risen, however slowly, and stays.

    The rise is `min_rise` of the level, at least 0.1.
    """

    settings: RunGuards
    _calm: deque[float] = field(init=False)
    _high: list[tuple[int, float]] = field(default_factory=list, init=False)
    _block: list[tuple[int, float]] = field(default_factory=list, init=False)
    _best: Sequence[float] | None = field(default=None, init=False)
    _raised_since: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._calm = deque(maxlen=self.settings.window)

    def see(self, step: int, loss: float) -> Finding | None:
        """What the loss of this step, with those before it, amounts to."""
        return self._spike(step, loss) or self._plateau(step, loss)

    def _spike(self, step: int, loss: float) -> Finding | None:
        if len(self._calm) < self.settings.window // 2 or not self._is_high(loss):
            # A few high ones were noise, and the next limit has to know of such noise.
            self._calm.extend(value for _, value in self._high)
            self._calm.append(loss)
            self._high.clear()
            return None
        self._high.append((step, loss))
        if len(self._high) < self.settings.spike_steps:
            return None
        now = median(value for _, value in self._high)
        return Finding(RollbackReason.SPIKE, self._high[0][0], median(self._calm), now)

    def _is_high(self, loss: float) -> bool:
        level = median(self._calm)
        if loss <= level + self._rise(level):
            return False
        spread = _MAD_TO_DEVIATION * median(abs(value - level) for value in self._calm)
        return loss > max(_upper(self._calm), level + _DEVIATIONS * spread)

    def _plateau(self, step: int, loss: float) -> Finding | None:
        self._block.append((step, loss))
        if len(self._block) < self.settings.window:
            return None
        first, losses = self._block[0][0], [value for _, value in self._block]
        self._block.clear()
        if self._best is None or median(losses) <= median(self._best):
            self._best, self._raised_since = losses, None
            return None
        before, now = median(self._best), median(losses)
        if now <= max(_upper(self._best), before + self._rise(before)):
            self._raised_since = None
            return None
        if self._raised_since is None:
            self._raised_since = first
            return None
        return Finding(RollbackReason.PLATEAU, self._raised_since, before, now)

    def _rise(self, level: float) -> float:
        return max(_LEAST_RISE, self.settings.min_rise * abs(level))


def _upper(losses: Sequence[float] | deque[float]) -> float:
    ordered = sorted(losses)
    return ordered[math.ceil(_UPPER_QUANTILE * len(ordered)) - 1]


class LossGuard:
    """Ends the run when the loss goes wrong, where the run asks for that."""

    def __init__(self, run: RunFile) -> None:
        self._settings = run.guards
        self._watch = LossWatch(run.guards) if run.guards.loss_spike is LossSpikeGuard.ROLLBACK else None

    def recall(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Take up the losses of the steps before a resume, from the library's history."""
        if self._watch is not None:
            self._watch = LossWatch(self._settings)
            for entry in history:
                if "loss" in entry:
                    self._watch.see(int(entry["step"]), float(entry["loss"]))

    def see(self, step: int, loss: float) -> None:
        """Take the loss of a step; all ranks give the same. Raises LossAlarm."""
        found = self._watch.see(step, loss) if self._watch is not None else None
        if found is None:
            return
        what = "jumped" if found.reason is RollbackReason.SPIKE else "rose and stayed high"
        raise LossAlarm(
            f"The training loss {what} at step {found.onset_step}: from about {found.before:.4g} to {found.now:.4g}. "
            "Lower hyperparameters.learningRate, raise warmupRatio or globalBatchSize, or look for broken records.",
            reason=found.reason,
            onset_step=found.onset_step,
        )


def in_force(run: RunFile, guards: GuardState) -> RunFile:
    """The run as this attempt works: micro batch and accumulation after the guards, all else as planned."""
    planned = run.hyperparameters
    micro_batch, accumulation = guards.split(planned.micro_batch_size, planned.gradient_accumulation)
    changed = planned.model_copy(update={"micro_batch_size": micro_batch, "gradient_accumulation": accumulation})
    return run.model_copy(update={"hyperparameters": changed})


def lower_rates(scheduler: Any, guards: GuardState) -> None:
    """Multiply the rate of each step k by guards.learning_rate_factor(k), whatever the schedule.

    scheduler: a LambdaLR before the first step or the load of its state. Steps are counted as the schedule counts them:
    one that the FP16 scaler skips is none.
    """
    if guards.rollbacks:
        scheduler.lr_lambdas = [_lowered(planned, guards) for planned in scheduler.lr_lambdas]
        set_rates(scheduler)


def set_rates(scheduler: Any) -> None:
    """The optimizer has the rates that the schedule says of the next step; a restored one has those of another plan."""
    rates = [
        base * shape(scheduler.last_epoch) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _lowered(planned: Callable[[int], float], guards: GuardState) -> Callable[[int], float]:
    # A plain function: the scheduler would write any other callable's content into the checkpoint.
    def shape(steps_made: int) -> float:
        return planned(steps_made) * guards.learning_rate_factor(steps_made + 1)

    return shape
