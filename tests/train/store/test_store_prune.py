"""Pruning: old checkpoints go, what may still be needed stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.store.checkpoints import list_checkpoints, restore
from finetune_trainer.store.errors import (
    CheckpointInvalid,
    StorageUnavailable,
    Superseded,
)
from finetune_trainer.store.objects import join_key
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Run, Same, committed, damage_flip, steps


def test_pruning_keeps_the_newest_the_named_and_the_one_resumed_from(run: Run) -> None:
    committed(run, 10, 20, 30)
    _, writer, _ = run.start(attempt=2)
    for step in (40, 50, 60, 70):
        writer.commit(step, run.saved(step), world_size=1)
    assert writer.prune(keep_last=2, keep_steps={20}) == (10, 40, 50)
    assert steps(run.place) == [70, 60, 30, 20]
    assert writer.prune(keep_last=2, keep_steps={20}) == ()
    start, _, _ = run.start(attempt=3)
    assert start.resumed is not None and start.resumed.step == 70 and start.skipped == ()


def test_the_best_step_of_a_kept_checkpoint_is_kept_too(run: Run) -> None:
    """A run that goes on from the one before the newest asks for the best step that this one knows of."""
    _, writer, _ = run.start()
    for step, best in ((10, 10), (20, 10), (30, 30), (40, 30)):
        writer.commit(step, run.saved(step), world_size=1, meta={"best": [best]})
    assert writer.prune(keep_last=1, keep_steps={30}, keep_back=20) == ()
    assert steps(run.place) == [40, 30, 20, 10], "20 is far enough back, and its best is 10"
    writer.commit(50, run.saved(50), world_size=1, meta={"best": [50]})
    assert writer.prune(keep_last=1, keep_steps={50}, keep_back=20) == (10, 20)
    assert steps(run.place) == [50, 40, 30]


def test_a_rollback_to_before_what_is_left_is_a_fresh_start_not_damage(run: Run) -> None:
    committed(run, 10, 20, 30)
    _, writer, _ = run.start(attempt=2)
    assert writer.prune(keep_last=1) == (10, 20)
    start, _, _ = run.start(attempt=2, max_step=25)
    assert start.resumed is None and start.skipped == ()


def test_pruning_leaves_no_file_of_what_it_removed(run: Run) -> None:
    writer, _ = committed(run, 10, 20)
    writer.prune(keep_last=1)
    assert {key.rpartition("/step-")[2].split("/")[0] for key in run.place.list_keys() if "step" in key} == {"20"}
    assert len(run.place.list_keys()) == 5


def test_pruning_counts_only_whole_checkpoints(run: Run) -> None:
    writer, _ = committed(run, 10, 20, 30)
    (run.place.folder / "checkpoints/fence-1/step-30/adapter.safetensors").unlink()
    assert writer.prune(keep_last=1) == (10,)
    start, _, _ = run.start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 20


def test_pruning_removes_nothing_when_nothing_is_whole(run: Run) -> None:
    writer, _ = committed(run, 10)
    (run.place.folder / "checkpoints/fence-1/step-10/adapter.safetensors").unlink()
    before = run.place.list_keys()
    assert writer.prune(keep_last=1) == () and run.place.list_keys() == before


def test_pruning_sweeps_torn_uploads_and_late_writes(run: Run) -> None:
    committed(run, 10)
    run.place.store.put(join_key(run.place.prefix, "checkpoints/fence-1/step-15/adapter.safetensors"), b"torn")
    _, writer, _ = run.start(attempt=2)
    run.place.store.put(join_key(run.place.prefix, "checkpoints/fence-1/step-99/MANIFEST.json"), b"late")
    run.place.store.put(join_key(run.place.prefix, "checkpoints/notes.txt"), b"not ours")
    assert writer.prune(keep_last=5) == ()
    assert [key for key in run.place.list_keys() if "step-15" in key or "step-99" in key] == []
    assert "checkpoints/notes.txt" in run.place.list_keys() and steps(run.place) == [10]


def test_pruning_everything_is_refused(run: Run) -> None:
    writer, _ = committed(run, 10)
    with pytest.raises(ValueError, match="keep_last is 0"):
        writer.prune(keep_last=0)


def test_restoring_what_was_pruned_is_told(run: Run, tmp_path: Path) -> None:
    writer, _ = committed(run, 10, 20)
    gone = list_checkpoints(run.place.store, run.place.prefix)[1].ref
    writer.prune(keep_last=1)
    with pytest.raises(CheckpointInvalid, match="manifest is missing"):
        restore(run.place.store, run.place.prefix, gone, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pruning_that_is_cut_off_leaves_no_checkpoint_without_its_parts(run: Run) -> None:
    class CutOff(Between):
        left = 1

        def delete(self, key: str) -> None:
            if self.left == 0:
                raise StorageUnavailable("no answer")
            self.left -= 1
            self.real.delete(key)

    writer, _ = committed(run, 10, 20)
    with pytest.raises(StorageUnavailable):
        CheckpointWriter(CutOff(run.place.store), run.place.prefix, writer.fence).prune(keep_last=1)
    assert steps(run.place) == [20]
    assert len([key for key in run.place.list_keys() if "step-10" in key]) == 2
    assert writer.prune(keep_last=1) == ()
    assert [key for key in run.place.list_keys() if "step-10" in key] == []


# An old attempt whose prune goes on after a newer one started


def test_a_newer_attempt_never_resumes_from_what_a_stalled_prune_still_removes(run: Run) -> None:
    """The newest checkpoint is damaged while the old prune stands still before its first deletion of step 10."""
    told: list[str] = []

    class Stalled(Between):
        def delete(self, key: str) -> None:
            if not told:
                damage_flip(run.place.folder / "checkpoints/fence-1/step-20/adapter.safetensors")
                with pytest.raises(CheckpointInvalid) as caught:
                    run.start(attempt=2)
                told.append(str(caught.value))
            self.real.delete(key)

    writer, _ = committed(run, 10, 20)
    stalled = CheckpointWriter(Stalled(run.place.store), run.place.prefix, writer.fence)
    # From the moment it says what it removes, step 10 is gone for every later start, though its files are there.
    assert stalled.prune(keep_last=1) == (10,)
    assert len(told) == 1 and "none of the 1 checkpoints" in told[0]


def test_a_prune_that_was_overtaken_before_its_first_deletion_removes_nothing(run: Run, same_folder: Same) -> None:
    newer: list[CheckpointWriter] = []

    class Overtaken(Between):
        def put(self, key: str, data: bytes | Path) -> None:
            newer.append(run.start(attempt=2, max_step=15)[1])
            self.real.put(key, data)

    writer, folders = committed(run, 10, 20)
    with pytest.raises(Superseded):
        CheckpointWriter(Overtaken(run.place.store), run.place.prefix, writer.fence).prune(keep_last=1)
    newer[0].commit(25, run.saved(25), world_size=1)
    assert steps(run.place) == [25, 10]
    restore(run.place.store, run.place.prefix, newer[0].fence.chain[0], run.work / "check")
    assert same_folder(run.work / "check", folders[10])
    # The list of the prune that did not happen goes with the next one that does.
    _, writer, _ = run.start(attempt=3)
    writer.prune(keep_last=1)
    assert [key for key in run.place.list_keys() if "removals" in key] == []


def test_a_prune_that_was_killed_is_finished_by_the_next(run: Run, same_folder: Same) -> None:
    class Killed(Between):
        def delete(self, key: str) -> None:
            raise StorageUnavailable("no answer")

    writer, folders = committed(run, 10, 20, 30)
    with pytest.raises(StorageUnavailable):
        CheckpointWriter(Killed(run.place.store), run.place.prefix, writer.fence).prune(keep_last=1)
    assert steps(run.place) == [30]
    start, writer, target = run.start(attempt=2)
    assert [ref.step for ref in start.fence.chain] == [30] and same_folder(target, folders[30])
    writer.prune(keep_last=5)
    assert [key for key in run.place.list_keys() if "step-" in key and "step-30" not in key] == []
    assert [key for key in run.place.list_keys() if "removals" in key] == []
