"""What the guards have changed travels with the starts, and pruning leaves what a rollback goes back to."""

from __future__ import annotations

import pytest

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_trainer.store.checkpoints import start_attempt
from finetune_trainer.store.errors import Superseded
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Place, Run, committed, steps

ROLLBACK = Rollback(reason=RollbackReason.SPIKE, onset_step=28, to_step=20, until_step=45, factor=0.5)


SMALLER = GuardState(micro_batch_divisor=2)


def begin(
    run: Run,
    attempt: int,
    guards: GuardState | None = None,
    max_step: int | None = None,
    follows: int | None = None,
    job_uid: str = "uid-a",
) -> CheckpointWriter:
    """The writer of an attempt that starts with these guards."""
    start = start_attempt(
        run.place.store,
        run.place.prefix,
        job_uid=job_uid,
        attempt=attempt,
        restore_to=run.work / f"resume-of-{job_uid}-{attempt}-{follows}",
        max_step=max_step,
        guards=guards,
        follows=follows,
    )
    return CheckpointWriter(run.place.store, run.place.prefix, start.fence)


def test_guards_travel_from_fence_to_fence_until_they_are_replaced(run: Run) -> None:
    assert begin(run, 1).fence.guards == GuardState()
    assert begin(run, 2, SMALLER).fence.guards == SMALLER
    assert begin(run, 3).fence.guards == SMALLER
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


def test_a_change_in_mid_attempt_follows_the_attempts_own_fence(run: Run) -> None:
    first, _ = committed(run, 10)
    changed = begin(run, 1, SMALLER, follows=first.fence.fence)
    assert (changed.fence.fence, changed.newest_step, changed.fence.guards) == (2, 10, SMALLER)
    again = begin(run, 1, GuardState(micro_batch_divisor=4), follows=changed.fence.fence)
    assert (again.fence.fence, again.fence.guards.micro_batch_divisor) == (3, 4)


@pytest.mark.parametrize(("job_uid", "attempt"), [("uid-b", 0), ("uid-a", 1)], ids=["another job", "the same attempt"])
def test_a_change_never_takes_the_output_back(run: Run, job_uid: str, attempt: int) -> None:
    """An attempt that was cut off from the cluster still reaches the storage, and runs out of memory."""
    old, _ = committed(run, 10)
    new = begin(run, attempt, job_uid=job_uid)
    with pytest.raises(Superseded, match=r"fence 2 has taken .* over from fence 1"):
        begin(run, 1, SMALLER, follows=old.fence.fence)
    new.commit(20, run.saved(20), world_size=1)
    assert steps(run.place) == [20, 10]
    assert begin(run, 2, job_uid=job_uid).fence.guards == GuardState()


def test_of_a_change_and_a_start_at_the_same_moment_the_start_has_the_output(run: Run) -> None:
    old, _ = committed(run, 10)

    class Overtaken(Between):
        done = False

        def put_if_absent(self, key: str, data: bytes) -> bool:
            if not self.done:
                self.done = True
                begin(run, 1, job_uid="uid-b")
            return self.real.put_if_absent(key, data)

    place = Place(Overtaken(run.place.store), run.place.prefix, run.place.folder)
    with pytest.raises(Superseded, match="fence 2 has taken"):
        begin(Run(place, run.work), 1, SMALLER, follows=old.fence.fence)
    assert [key for key in run.place.list_keys() if key.startswith("fences/3")] == []
