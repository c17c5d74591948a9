"""Checkpoints: what is committed is found, whole, by whoever comes next."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.store.checkpoints import list_checkpoints, restore
from finetune_trainer.store.errors import (
    ObjectNotFound,
    StorageUnavailable,
    StoreError,
)
from finetune_trainer.store.objects import ObjectStore, join_key
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Run, Same, committed, steps


def test_an_empty_output_is_a_fresh_start(run: Run) -> None:
    start, writer, target = run.start()
    assert (start.fence.fence, start.resumed, start.skipped, writer.newest_step) == (1, None, (), None)
    assert not target.exists()
    assert run.place.list_keys() == ["fences/1", "fences/1.taken"]


def test_the_next_attempt_gets_the_newest_checkpoint_byte_by_byte(run: Run, same_folder: Same) -> None:
    _, folders = committed(run, 10, 20)
    start, writer, target = run.start(attempt=2)
    assert start.resumed is not None and (start.resumed.step, writer.newest_step) == (20, 20)
    assert same_folder(target, folders[20])
    assert start.fence.base == start.resumed.ref
    assert [path.name for path in target.parent.iterdir() if ".partial" in path.name] == []


def test_the_keys_are_those_of_the_design(run: Run) -> None:
    committed(run, 10)
    assert run.place.list_keys() == [
        "checkpoints/fence-1/step-10/MANIFEST.json",
        "checkpoints/fence-1/step-10/adapter.safetensors",
        "checkpoints/fence-1/step-10/optimizer/rank_0.safetensors",
        "fences/1",
        "fences/1.taken",
    ]


def test_a_manifest_carries_what_the_trainer_gave_it(run: Run) -> None:
    _, writer, _ = run.start(attempt=7)
    writer.commit(
        5, run.saved(5), world_size=4, meta={"data": {"row": 3, "seed": None}}, metrics={"loss": 1.5, "bad": math.nan}
    )
    manifest = list_checkpoints(run.place.store, run.place.prefix)[0].manifest
    assert (manifest.job_uid, manifest.attempt, manifest.fence, manifest.world_size) == ("uid-a", 7, 1, 4)
    assert manifest.meta == {"data": {"row": 3, "seed": None}}
    assert manifest.metrics == {"loss": 1.5, "bad": None}
    assert [(part.name, part.size) for part in manifest.parts] == [
        ("adapter.safetensors", 1300),
        ("optimizer/rank_0.safetensors", 10),
    ]


def test_parts_without_a_manifest_are_no_checkpoint(run: Run) -> None:
    committed(run, 10)
    run.place.store.put(join_key(run.place.prefix, "checkpoints/fence-1/step-20/adapter.safetensors"), b"torn")
    start, _, _ = run.start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 10
    assert start.skipped == ()


def test_restoring_never_mixes_with_what_is_there(run: Run, tmp_path: Path) -> None:
    committed(run, 10)
    ref = list_checkpoints(run.place.store, run.place.prefix)[0].ref
    target = tmp_path / "occupied"
    target.mkdir()
    (target / "other").write_text("x")
    with pytest.raises(StoreError, match="occupied"):
        restore(run.place.store, run.place.prefix, ref, target)
    assert [path.name for path in target.iterdir()] == ["other"]


def test_a_commit_that_failed_on_the_way_can_be_made_again(run: Run, same_folder: Same) -> None:
    """The storage fails once at each of its operations in turn; then the same call goes through."""

    class FailingOnce(Between):
        def __init__(self, store: ObjectStore, at: int) -> None:
            super().__init__(store)
            self.left = at

        def __getattr__(self, name: str) -> Any:
            method = getattr(self.real, name)
            if name == "uri":
                return method

            def call(*arguments: Any, **named: Any) -> Any:
                self.left -= 1
                result = method(*arguments, **named)
                if self.left == 0:
                    raise StorageUnavailable("the answer was lost")
                return result

            return call

    _, first, _ = run.start()
    failures = 0
    for at in range(1, 20):
        step, folder = at * 10, run.saved(at * 10)
        writer = CheckpointWriter(FailingOnce(run.place.store, at), run.place.prefix, first.fence)
        try:
            writer.commit(step, folder, world_size=1)
        except StorageUnavailable:
            failures += 1
            writer.commit(step, folder, world_size=1)
        checkpoint = list_checkpoints(run.place.store, run.place.prefix)[0]
        assert checkpoint.step == step
        target = run.work / f"check-{step}"
        restore(run.place.store, run.place.prefix, checkpoint.ref, target)
        assert same_folder(target, folder)
    assert failures >= 4


def test_steps_only_grow(run: Run) -> None:
    writer, folders = committed(run, 10, 20)
    with pytest.raises(ValueError, match="older than the newest"):
        writer.commit(10, folders[10], world_size=1)
    with pytest.raises(ValueError, match="with other content"):
        writer.commit(20, run.saved(20, "other"), world_size=1)
    assert writer.commit(20, folders[20], world_size=1).step == 20
    _, writer, _ = run.start(attempt=2)
    with pytest.raises(ValueError, match="resumed from"):
        writer.commit(20, run.saved(20, "other"), world_size=1)
    assert steps(run.place) == [20, 10]


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "odd name", "reserved", "empty"])
def test_a_folder_that_cannot_be_stored_safely_is_refused(run: Run, kind: str, tmp_path: Path) -> None:
    _, writer, _ = run.start()
    folder = run.saved(10)
    match kind:
        case "link to a file":
            (folder / "x").symlink_to("/etc/hostname")
        case "link to a folder":
            (folder / "x").symlink_to(tmp_path, target_is_directory=True)
        case "pipe":
            os.mkfifo(folder / "x")
        case "odd name":
            (folder / "a\nb").write_text("x")
        case "reserved":
            (folder / "MANIFEST.json").write_text("{}")
        case "empty":
            folder = tmp_path / "none"
            folder.mkdir()
    with pytest.raises(ValueError, match=r"link|special|not a valid file name|the store's own|no files"):
        writer.commit(10, folder, world_size=1)
    assert run.place.list_keys() == ["fences/1", "fences/1.taken"]


def test_a_folder_that_changes_during_the_upload_is_not_committed(run: Run) -> None:
    folder = run.saved(10)

    class Changing(Between):
        def put(self, key: str, data: bytes | Path) -> None:
            (folder / "adapter.safetensors").write_bytes(b"newer")
            self.real.put(key, data)

    start, _, _ = run.start()
    writer = CheckpointWriter(Changing(run.place.store), run.place.prefix, start.fence)
    with pytest.raises(ValueError, match="changed while it was uploaded"):
        writer.commit(10, folder, world_size=1)
    assert steps(run.place) == []


def test_a_missing_local_folder_is_told(run: Run) -> None:
    _, writer, _ = run.start()
    with pytest.raises(ObjectNotFound, match="nowhere"):
        writer.commit(10, run.work / "nowhere", world_size=1)
