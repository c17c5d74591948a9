"""What the guards have changed travels with the starts, and pruning leaves what a rollback goes back to."""

from __future__ import annotations

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_trainer.store.checkpoints import start_attempt
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Run, committed, steps

ROLLBACK = Rollback(reason=RollbackReason.SPIKE, onset_step=28, to_step=20, until_step=45, factor=0.5)


def begin(run: Run, attempt: int, guards: GuardState | None = None, max_step: int | None = None) -> CheckpointWriter:
    """The writer of an attempt that starts with these guards."""
    start = start_attempt(
        run.place.store,
        run.place.prefix,
        job_uid="uid-a",
        attempt=attempt,
        restore_to=run.work / f"resume-of-{attempt}",
        max_step=max_step,
        guards=guards,
    )
    return CheckpointWriter(run.place.store, run.place.prefix, start.fence)


def test_guards_travel_from_fence_to_fence_until_they_are_replaced(run: Run) -> None:
    assert begin(run, 1).fence.guards == GuardState()
    smaller = GuardState(micro_batch_divisor=2)
    assert begin(run, 2, smaller).fence.guards == smaller
    assert begin(run, 3).fence.guards == smaller
    both = GuardState(micro_batch_divisor=2, rollbacks=(ROLLBACK,))
    assert begin(run, 4, both, max_step=20).fence.guards == both
    assert begin(run, 5).fence.guards == both


def test_what_a_rollback_goes_back_to_stays_until_the_spot_is_passed(run: Run) -> None:
    committed(run, 10, 20, 30)
    writer = begin(run, 2, GuardState(rollbacks=(ROLLBACK,)), max_step=ROLLBACK.to_step)
    assert writer.newest_step == 20
    for step in (25, 30):
        writer.commit(step, run.saved(step, "again"), world_size=1)
    assert writer.prune(keep_last=1) == (10, 25)
    writer = begin(run, 3)  # resumes from step 30, and still knows of the rollback
    writer.commit(35, run.saved(35), world_size=1)
    writer.commit(40, run.saved(40), world_size=1)
    writer.prune(keep_last=1)
    assert steps(run.place) == [40, 30, 20]
    writer.commit(45, run.saved(45), world_size=1)
    writer.prune(keep_last=1)
    assert steps(run.place) == [45, 30]
