"""What earlier alarms have changed is in force in the worker: rate, micro batch, memory of the losses, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_api.job import LossSpikeGuard, Schedule
from finetune_api.runfile import RunGuards
from finetune_trainer.worker.guards import LossAlarm, LossGuard
from tests.train.worker.runs import Work, in_child, run_file, work_for


def rollback(until: int, factor: float) -> Rollback:
    return Rollback(
        reason=RollbackReason.SPIKE, onset_step=until - 2, to_step=until - 4, until_step=until, factor=factor
    )


def keep(work: Work, guards: GuardState) -> Work:
    """The work directory as the agent leaves it to workers under these guards."""
    (work.root / "guards.json").write_text(json.dumps(guards.to_json()))
    return work


def test_half_the_micro_batch_gives_the_losses_of_a_run_that_planned_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"totalSteps": 4, "saveSteps": 2}
    planned = work_for(tmp_path / "planned", microBatchSize=2, gradientAccumulation=4, **options)
    halved = keep(
        work_for(tmp_path / "halved", microBatchSize=8, gradientAccumulation=1, **options),
        GuardState(micro_batch_divisor=4),
    )
    assert planned.train() == [0], planned.logged()
    assert halved.train() == [0], halved.logged()
    assert halved.losses("checkpoints/step-4") == planned.losses("checkpoints/step-4"), "bit-equal"
    report = halved.read("artifact/report.json")
    assert report["guards"] == {"microBatchSize": 2, "gradientAccumulation": 4, "rollbacks": []}
    assert report["hyperparameters"]["microBatchSize"] == 8, "what was planned"
    assert report["lineage"]["runFileDigest"] == halved.run.digest()
    assert "ran out of memory with the planned micro batch of 8" in (halved.root / "artifact/report.md").read_text()

    whole = work_for(tmp_path / "whole", microBatchSize=8, gradientAccumulation=1, **options)
    assert whole.train() == [0], whole.logged()
    changed = keep(whole.resumed_from(whole, 2, tmp_path / "changed"), GuardState(micro_batch_divisor=4))
    assert changed.train() == [0], changed.logged()
    for found, expected in zip(changed.losses("checkpoints/step-4"), planned.losses("checkpoints/step-4"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5), "the same records in each step, before and after"


def test_the_rate_of_each_step_is_the_planned_one_times_the_factor_whatever_the_schedule() -> None:
    guards = GuardState(rollbacks=(rollback(7, 0.5), rollback(9, 0.25)))
    for schedule, (planned, lowered, resumed) in in_child(_rates, guards.to_json()).items():
        factors = [guards.learning_rate_factor(step) for step in range(1, 13)]
        assert factors == [0.25] * 9 + [1.0] * 3
        assert lowered == pytest.approx([a * b for a, b in zip(planned, factors, strict=True)], rel=1e-12), schedule
        assert resumed == lowered[5:], f"{schedule}: a checkpoint of the planned run, taken up under the guards"
        assert planned[9:] == lowered[9:], f"{schedule}: the very rate that was planned"


def _rates(guards: dict[str, Any]) -> dict[str, tuple[list[float], list[float], list[float]]]:
    import torch
    from transformers import get_scheduler

    from finetune_trainer.worker.arguments import SCHEDULES
    from finetune_trainer.worker.guards import lower_rates, set_rates

    def made(schedule: Schedule, state: GuardState) -> tuple[Any, Any]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        name, shape = SCHEDULES[schedule]
        scheduler = get_scheduler(name, optimizer, 3, 12, scheduler_specific_kwargs=shape)
        lower_rates(scheduler, state)
        return optimizer, scheduler

    def walk(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            assert len({group["lr"] for group in optimizer.param_groups}) == 1
            assert scheduler.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    def resumed(schedule: Schedule, state: GuardState) -> list[float]:
        optimizer, scheduler = made(schedule, GuardState())
        walk(optimizer, scheduler, 5)
        kept = optimizer.state_dict(), scheduler.state_dict()
        optimizer, scheduler = made(schedule, state)
        optimizer.load_state_dict(kept[0])
        scheduler.load_state_dict(kept[1])
        set_rates(scheduler)
        return walk(optimizer, scheduler, 7)

    state = GuardState.from_json(guards)
    return {
        schedule.value: (
            walk(*made(schedule, GuardState()), 12),
            walk(*made(schedule, state), 12),
            resumed(schedule, state),
        )
        for schedule in Schedule
    }


def test_a_scheduler_under_guards_leaves_nothing_but_plain_values_in_a_checkpoint(tmp_path: Path) -> None:
    assert in_child(_saved, str(tmp_path / "scheduler.pt")) == [None]


def _saved(path: str) -> Any:
    import torch
    from transformers import get_scheduler

    from finetune_trainer.worker.guards import lower_rates

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler("linear", optimizer, 0, 10)
    lower_rates(scheduler, GuardState(rollbacks=(rollback(7, 0.5),)))
    torch.save(scheduler.state_dict(), path)
    return torch.load(path, weights_only=True)["lr_lambdas"]


def guarded() -> LossGuard:
    guards = RunGuards(loss_spike=LossSpikeGuard.ROLLBACK)
    return LossGuard(run_file().model_copy(update={"guards": guards}))


def test_the_memory_of_the_losses_survives_a_resume() -> None:
    """Seven high losses before the resume, and the eighth after it."""
    history = [{"step": step, "loss": 2.0 if step <= 100 else 6.0} for step in range(1, 108)]
    history.insert(50, {"step": 50, "eval_loss": 9.0})
    guard = guarded()
    guard.recall(history)
    with pytest.raises(LossAlarm) as caught:
        guard.see(108, 6.0)
    assert (caught.value.failure_class, caught.value.onset_step) == ("LossSpike", 101)
    assert "jumped at step 101: from about 2 to 6" in str(caught.value)
    fresh = guarded()
    fresh.recall([])
    fresh.see(108, 6.0)


def test_a_guard_that_is_off_sees_nothing() -> None:
    guard = LossGuard(run_file())
    for step in range(1, 400):
        guard.see(step, 2.0 if step < 200 else 90.0)
