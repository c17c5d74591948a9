"""Files that did not change are uploaded once, and stay as long as a checkpoint needs them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_trainer.store.checkpoints import list_checkpoints, restore, start_attempt
from finetune_trainer.store.documents import Place as At
from finetune_trainer.store.errors import CheckpointInvalid, StorageUnavailable, Superseded
from finetune_trainer.store.objects import ObjectStore
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Run, Same, committed, damage_cut, damage_flip, steps

FROZEN = b"frozen words" * 1000


class Counting:
    """Passes everything on; keeps the keys of what is put."""

    def __init__(self, store: ObjectStore) -> None:
        self.real = store
        self.put_keys: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def put(self, key: str, data: bytes | Path) -> None:
        self.put_keys.append(key)
        self.real.put(key, data)


def saved(run: Run, step: int, frozen: bytes = FROZEN) -> Path:
    """A checkpoint folder with a file that is the same in every step."""
    folder = run.saved(step)
    (folder / "tokenizer.json").write_bytes(frozen)
    return folder


def places(run: Run) -> dict[int, tuple[int, int] | None]:
    """By step, where the unchanged file of the checkpoint lies; None is in the checkpoint itself."""
    found = {}
    for checkpoint in list_checkpoints(run.place.store, run.place.prefix):
        part = next(part for part in checkpoint.manifest.parts if part.name == "tokenizer.json")
        found[checkpoint.step] = (part.at.fence, part.at.step) if part.at else None
    return found


def test_an_unchanged_file_goes_up_once_and_every_checkpoint_restores_whole(run: Run, same_folder: Same) -> None:
    start, _, _ = run.start()
    store = Counting(run.place.store)
    writer = CheckpointWriter(store, run.place.prefix, start.fence)
    folders = {step: saved(run, step) for step in (10, 20, 30)}
    for step, folder in folders.items():
        writer.commit(step, folder, world_size=1)
    assert [key.rpartition("/step-")[2] for key in store.put_keys if "tokenizer" in key] == ["10/tokenizer.json"]
    assert len(store.put_keys) == 7
    assert places(run) == {10: None, 20: (1, 10), 30: (1, 10)}
    for checkpoint in list_checkpoints(run.place.store, run.place.prefix):
        restore(run.place.store, run.place.prefix, checkpoint.ref, run.work / f"check-{checkpoint.step}")
        assert same_folder(run.work / f"check-{checkpoint.step}", folders[checkpoint.step])


def test_a_changed_file_of_the_same_name_and_length_goes_up_again(run: Run, same_folder: Same) -> None:
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10), world_size=1)
    folder = saved(run, 20, FROZEN[::-1])
    writer.commit(20, folder, world_size=1)
    assert places(run) == {10: None, 20: None}
    assert same_folder(run.start(attempt=2)[2], folder)


def test_a_later_attempt_uses_the_files_of_the_one_it_resumed_from(run: Run, same_folder: Same) -> None:
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10), world_size=1)
    for attempt, step in ((2, 20), (3, 30)):
        _, writer, _ = run.start(attempt)
        folder = saved(run, step)
        writer.commit(step, folder, world_size=1)
    assert places(run) == {10: None, 20: (1, 10), 30: (1, 10)}
    assert same_folder(run.start(attempt=4)[2], folder)


def test_a_rollback_shares_nothing_with_what_it_forgot(run: Run) -> None:
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10, b"old"), world_size=1)
    writer.commit(20, saved(run, 20), world_size=1)
    _, writer, _ = run.start(attempt=2, max_step=15)
    writer.commit(20, saved(run, 20), world_size=1)
    assert places(run) == {10: None, 20: None}


def test_pruning_keeps_shared_files_until_nobody_needs_them(run: Run, same_folder: Same) -> None:
    writer, _ = committed(run)
    for step in (10, 20, 30):
        folder = saved(run, step)
        writer.commit(step, folder, world_size=1)
    assert writer.prune(keep_last=1) == (10, 20)
    assert steps(run.place) == [30]
    left = [key for key in run.place.list_keys() if "step-10" in key or "step-20" in key]
    assert left == ["checkpoints/fence-1/step-10/tokenizer.json"]
    assert same_folder(run.start(attempt=2)[2], folder)
    _, writer, _ = run.start(attempt=2)
    changed = saved(run, 40, b"other words")
    writer.commit(40, changed, world_size=1)
    writer.prune(keep_last=1)  # keeps step 30: this attempt resumed from it
    assert "checkpoints/fence-1/step-10/tokenizer.json" in run.place.list_keys()
    _, writer, target = run.start(attempt=3)
    assert same_folder(target, changed)
    writer.prune(keep_last=1)
    assert [key for key in run.place.list_keys() if "fence-1/" in key or "removals" in key] == []
    assert steps(run.place) == [40]


@pytest.mark.parametrize("damage", [Path.unlink, damage_cut])
def test_a_shared_file_that_is_gone_or_cut_is_uploaded_again(run: Run, same_folder: Same, damage: Any) -> None:
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10), world_size=1)
    damage(run.place.folder / "checkpoints/fence-1/step-10/tokenizer.json")
    folder = saved(run, 20)
    writer.commit(20, folder, world_size=1)
    assert places(run)[20] is None
    start, _, target = run.start(attempt=2)
    assert start.skipped == () and same_folder(target, folder)


def test_a_shared_file_that_was_altered_is_told_for_every_checkpoint_that_needs_it(run: Run) -> None:
    writer, _ = committed(run)
    for step in (10, 20):
        writer.commit(step, saved(run, step), world_size=1)
    damage_flip(run.place.folder / "checkpoints/fence-1/step-10/tokenizer.json")
    for checkpoint in list_checkpoints(run.place.store, run.place.prefix):
        with pytest.raises(CheckpointInvalid, match=r"step-10/tokenizer\.json was altered"):
            restore(run.place.store, run.place.prefix, checkpoint.ref, run.work / f"check-{checkpoint.step}")


def test_a_commit_that_is_repeated_finds_its_shared_files(run: Run) -> None:
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10), world_size=1)
    folder = saved(run, 20)
    first = writer.commit(20, folder, world_size=1)
    assert writer.commit(20, folder, world_size=1) == first
    part = next(part for part in first.manifest.parts if part.name == "tokenizer.json")
    assert (part.at, part.sha256) == (At(fence=1, step=10), hashlib.sha256(FROZEN).hexdigest())


# An old attempt whose prune goes on after a newer one started


class StartsBefore:
    """Runs an action just before the first call of a method."""

    def __init__(self, store: ObjectStore, method: str, action: Any) -> None:
        self.real = store
        self.method = method
        self.action = action

    def __getattr__(self, name: str) -> Any:
        if name == self.method and self.action:
            action, self.action = self.action, None
            action()
        return getattr(self.real, name)


def test_a_newer_attempt_never_shares_what_a_stalled_prune_still_removes(run: Run) -> None:
    """The newest file is damaged while the old prune stands still before its first deletion of step 10."""
    writer, _ = committed(run)
    writer.commit(10, saved(run, 10), world_size=1)
    writer.commit(20, saved(run, 20, b"other words"), world_size=1)
    told: list[str] = []

    def newer() -> None:
        damage_flip(run.place.folder / "checkpoints/fence-1/step-20/adapter.safetensors")
        try:
            run.start(attempt=2)
        except CheckpointInvalid as error:
            told.append(str(error))

    stalled = CheckpointWriter(StartsBefore(run.place.store, "delete", newer), run.place.prefix, writer.fence)
    # From the moment it says what it removes, step 10 is gone for every later start, though its files are there.
    assert stalled.prune(keep_last=1) == (10,)
    assert len(told) == 1 and "none of the 1 checkpoints" in told[0]


def test_a_prune_that_was_overtaken_before_its_first_deletion_removes_nothing(run: Run, same_folder: Same) -> None:
    writer, _ = committed(run)
    first = saved(run, 10)
    writer.commit(10, first, world_size=1)
    writer.commit(20, saved(run, 20), world_size=1)
    newer: list[CheckpointWriter] = []

    class Overtaken(Counting):
        def put(self, key: str, data: bytes | Path) -> None:
            newer.append(run.start(attempt=2, max_step=15)[1])
            self.real.put(key, data)

    with pytest.raises(Superseded):
        CheckpointWriter(Overtaken(run.place.store), run.place.prefix, writer.fence).prune(keep_last=1)
    folder = saved(run, 25)
    newer[0].commit(25, folder, world_size=1)
    assert places(run) == {25: (1, 10), 10: None}
    _, writer, target = run.start(attempt=3)
    assert same_folder(target, folder)
    # The list of the prune that did not happen goes with the next one that does.
    writer.prune(keep_last=1)
    assert [key for key in run.place.list_keys() if "removals" in key] == []


def test_a_prune_that_was_killed_is_finished_by_the_next(run: Run, same_folder: Same) -> None:
    writer, _ = committed(run)
    folders = {step: saved(run, step) for step in (10, 20, 30)}
    for step, folder in folders.items():
        writer.commit(step, folder, world_size=1)

    class Killed(Counting):
        def delete(self, key: str) -> None:
            raise StorageUnavailable("no answer")

    with pytest.raises(StorageUnavailable):
        CheckpointWriter(Killed(run.place.store), run.place.prefix, writer.fence).prune(keep_last=1)
    assert steps(run.place) == [30]
    start, writer, target = run.start(attempt=2)
    assert [ref.step for ref in start.fence.chain] == [30] and same_folder(target, folders[30])
    writer.prune(keep_last=5)
    assert [key for key in run.place.list_keys() if "step-" in key and "step-30" not in key] == [
        "checkpoints/fence-1/step-10/tokenizer.json"
    ]
    assert [key for key in run.place.list_keys() if "removals" in key] == []


# Guards


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
