"""What a guard answers, and that it cannot answer for ever. What its state means for rate and micro batch."""

from __future__ import annotations

import pytest

from finetune_api.documents import Stage
from finetune_api.guards import MAX_ROLLBACKS, GuardState, Rollback, RollbackReason
from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunFile, RunGuards
from finetune_trainer.agent.ending import Alarm, End
from finetune_trainer.agent.guarding import Change, answer, collateral
from tests.train.worker.runs import run_file

SPIKE = End("LossSpike", "It jumped.", "spec.hyperparameters.learningRate", Alarm(RollbackReason.SPIKE, 120))
NO_MEMORY = End("OutOfGpuMemory", "The GPU ran out of memory.", "spec.hyperparameters.microBatchSize")


def guarded(**changes: int) -> RunFile:
    guards = RunGuards(loss_spike=LossSpikeGuard.ROLLBACK, rollback_steps=10, lowered_steps=20)
    return run_file(**changes).model_copy(update={"guards": guards})


def change(guards: GuardState, end: End, run: RunFile) -> Change:
    found = answer(guards, end, run, stage=Stage.TRAINING, step=130)
    assert isinstance(found, Change), found
    return found


def test_a_spike_goes_back_so_many_steps_before_its_onset_with_half_the_rate() -> None:
    found = change(GuardState(), SPIKE, guarded())
    assert found.to_step == 110
    assert found.guards.rollbacks == (
        Rollback(reason=RollbackReason.SPIKE, onset_step=120, to_step=110, until_step=140, factor=0.5),
    )
    assert "Rollback 1 of 5" in found.message
    rates = [found.guards.learning_rate_factor(step) for step in (1, 111, 140, 141)]
    assert rates == [0.5, 0.5, 0.5, 1.0]


def test_the_same_spot_again_halves_the_rate_once_more_and_another_one_does_not() -> None:
    once = change(GuardState(), SPIKE, guarded()).guards
    again = change(once, SPIKE, guarded()).guards
    assert [found.factor for found in again.rollbacks] == [0.5, 0.25]
    later = End("LossSpike", "", None, Alarm(RollbackReason.PLATEAU, 300))
    elsewhere = change(again, later, guarded()).guards
    assert elsewhere.rollbacks[2].factor == 0.5
    assert [elsewhere.learning_rate_factor(step) for step in (130, 141, 320, 321)] == [0.25, 0.5, 0.5, 1.0]


def test_an_onset_near_the_start_is_a_fresh_start() -> None:
    early = End("NonFiniteLoss", "", None, Alarm(RollbackReason.NON_FINITE, 4))
    assert change(GuardState(), early, guarded()).to_step == 0


def test_after_five_rollbacks_the_failure_stands_and_tells_its_history() -> None:
    guards = GuardState()
    for _ in range(MAX_ROLLBACKS):
        guards = change(guards, SPIKE, guarded()).guards
    end = answer(guards, SPIKE, guarded(), stage=Stage.TRAINING, step=130)
    assert isinstance(end, End)
    assert (end.outcome, end.field) == ("LossSpike", SPIKE.field)
    assert end.message.startswith("It jumped. The run had gone back 5 times: LossSpike from step 120 on")
    assert "0.0312 of the planned learning rate" in end.message
    assert guards.learning_rate_factor(120) == 0.5**5


def test_a_loss_that_is_not_finite_is_answered_as_a_spike() -> None:
    plain = End("NonFiniteLoss", "A weight is not finite.")
    found = change(GuardState(), plain, guarded())
    assert found.guards.rollbacks[0].reason is RollbackReason.NON_FINITE
    assert found.to_step == 120, "where nothing tells the step, it is the last that was seen"
    assert answer(GuardState(), plain, guarded(), stage=Stage.EVALUATING, step=0) is plain, "the base itself is broken"


@pytest.mark.parametrize("outcome", ["LossSpike", "NonFiniteLoss"])
def test_with_the_guard_off_the_failure_stands(outcome: str) -> None:
    end = End(outcome, "", None, Alarm(RollbackReason.SPIKE, 120))
    assert answer(GuardState(), end, run_file(), stage=Stage.TRAINING, step=130) is end


def test_other_failures_are_none_of_its_business() -> None:
    for end in (End("Succeeded"), End("Stopped"), End("Hang", "x"), End("DataInvalid", "x")):
        assert answer(GuardState(), end, guarded(), stage=Stage.TRAINING, step=130) is end
        assert collateral(end) is end


def test_out_of_gpu_memory_halves_the_micro_batch_down_to_one_and_then_stands_with_a_hint() -> None:
    run, guards, seen = guarded(microBatchSize=8, gradientAccumulation=2), GuardState(), []
    while isinstance(found := answer(guards, NO_MEMORY, run, stage=Stage.TRAINING, step=1), Change):
        guards = found.guards
        assert found.to_step is None, "no checkpoint is given up"
        seen.append(guards.split(8, 2))
    assert seen == [(4, 4), (2, 8), (1, 16)]
    assert found.outcome == "OutOfGpuMemory"
    assert "The micro batch is 1 already" in found.message
    assert found.field == "spec.hyperparameters.maxSequenceLength"


def test_out_of_gpu_memory_before_any_batch_is_not_the_batch() -> None:
    found = answer(GuardState(), NO_MEMORY, guarded(microBatchSize=8), stage=Stage.LOADING, step=0)
    assert isinstance(found, End)
    assert found.field == "spec.resources.pool"


def test_both_kinds_of_change_add_up() -> None:
    once = change(GuardState(), SPIKE, guarded(microBatchSize=4)).guards
    both = change(once, NO_MEMORY, guarded(microBatchSize=4)).guards
    assert (both.micro_batch_divisor, len(both.rollbacks)) == (2, 1)


@pytest.mark.parametrize("end", [SPIKE, NO_MEMORY])
def test_a_later_node_leaves_the_answer_to_node_0(end: End) -> None:
    assert collateral(end).outcome == "CollectiveFailed"
    assert end.message in collateral(end).message


@pytest.mark.parametrize(
    ("planned", "divisor", "in_force"),
    [
        ((8, 2), 1, (8, 2)),
        ((8, 2), 2, (4, 4)),
        ((3, 2), 2, (2, 3)),
        ((3, 1), 2, (1, 3)),
        ((7, 4), 2, (4, 7)),
        ((6, 2), 4, (2, 6)),
        ((1, 4), 64, (1, 4)),
    ],
)
def test_the_effective_batch_stays_whatever_the_divisor(
    planned: tuple[int, int], divisor: int, in_force: tuple[int, int]
) -> None:
    found = GuardState(micro_batch_divisor=divisor).split(*planned)
    assert found == in_force
    assert found[0] * found[1] == planned[0] * planned[1]


def test_a_micro_batch_that_does_not_halve_evenly_still_gets_smaller_with_each_answer() -> None:
    run, guards, sizes = guarded(microBatchSize=35, gradientAccumulation=1), GuardState(), [35]
    while isinstance(found := answer(guards, NO_MEMORY, run, stage=Stage.TRAINING, step=1), Change):
        guards = found.guards
        sizes.append(guards.split(35, 1)[0])
    assert sizes == [35, 7, 5, 1]
