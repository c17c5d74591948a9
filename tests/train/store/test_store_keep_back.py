"""A rollback finds a checkpoint that is old enough, however often checkpoints are made and however few are kept."""

from __future__ import annotations

import pytest

from finetune_trainer.store.documents import CheckpointRef
from finetune_trainer.store.writer import far_back
from tests.train.store.conftest import Run, steps


@pytest.mark.parametrize("every", [1, 7, 30, 300])
def test_one_that_is_old_enough_is_always_left_and_few_beside_it(every: int) -> None:
    back, left = 20, []
    for step in range(every, 400 * every, every):
        whole = [CheckpointRef(fence=1, step=step, manifest_sha256="0" * 64), *left]
        left = sorted({whole[0], *far_back(whole, back)}, key=lambda ref: -ref.step)
        assert len(left) <= 3
        old = [ref.step for ref in left if ref.step <= step - back]
        if step - back >= every:
            assert old, f"step {step}: nothing to go back to in {left}"
            assert step - old[0] < 2 * (back + every), f"step {step}: {left}"


def test_pruning_keeps_what_a_rollback_may_need(run: Run) -> None:
    _, writer, _ = run.start()
    for step in (10, 20, 30, 40, 50):
        writer.commit(step, run.saved(step), world_size=1)
        writer.prune(keep_last=1, keep_back=25)
    assert steps(run.place) == [50, 30, 10]
    writer.prune(keep_last=1)
    assert steps(run.place) == [50]
