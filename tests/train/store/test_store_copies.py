"""Large files that did not change are copied by the storage instead of being sent again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import list_checkpoints, restore
from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Place, Run, Same, damage_cut, damage_flip

FROZEN = b"frozen words" * 100_000


class Counting(Between):
    """Keeps the keys of what is sent and of what is copied, both without what stands before the step."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.sent: list[str] = []
        self.copied: list[str] = []

    def put(self, key: str, data: bytes | Path) -> None:
        self.sent.append(key.rpartition("/step-")[2])
        self.real.put(key, data)

    def copy(self, source: str, key: str, sha256: str) -> bool:
        done: bool = self.real.copy(source, key, sha256)
        if done:
            self.copied.append(key.rpartition("/step-")[2])
        return done


def saved(run: Run, step: int, frozen: bytes = FROZEN) -> Path:
    """A checkpoint folder with a file that is the same in every step."""
    folder = run.saved(step)
    (folder / "tokenizer.json").write_bytes(frozen)
    return folder


def copies(run: Run) -> bool:
    """Whether the place is one that copies by itself: a disk does not."""
    return not isinstance(run.place.store, LocalStore)


def started(run: Run, attempt: int = 1) -> tuple[CheckpointWriter, Counting]:
    """A writer whose traffic is counted."""
    start, _, _ = run.start(attempt)
    store = Counting(run.place.store)
    return CheckpointWriter(store, run.place.prefix, start.fence), store


def test_an_unchanged_file_is_sent_once_and_each_checkpoint_has_its_own(run: Run, same_folder: Same) -> None:
    writer, store = started(run)
    folders = {step: saved(run, step) for step in (10, 20, 30)}
    for step, folder in folders.items():
        writer.commit(step, folder, world_size=1)
    sent = [name for name in store.sent if "tokenizer" in name]
    if copies(run):
        assert sent == ["10/tokenizer.json"]
        assert store.copied == ["20/tokenizer.json", "30/tokenizer.json"]
    else:
        assert sent == [f"{step}/tokenizer.json" for step in (10, 20, 30)]
    for checkpoint in list_checkpoints(run.place.store, run.place.prefix):
        restore(run.place.store, run.place.prefix, checkpoint.ref, run.work / f"check-{checkpoint.step}")
        assert same_folder(run.work / f"check-{checkpoint.step}", folders[checkpoint.step])
    assert writer.prune(keep_last=1) == (10, 20)
    assert same_folder(run.start(attempt=2)[2], folders[30])


def test_a_later_attempt_copies_from_the_checkpoint_that_it_resumed_from(run: Run, same_folder: Same) -> None:
    started(run)[0].commit(10, saved(run, 10), world_size=1)
    writer, store = started(run, attempt=2)
    folder = saved(run, 20)
    writer.commit(20, folder, world_size=1)
    assert store.copied == (["20/tokenizer.json"] if copies(run) else [])
    assert same_folder(run.start(attempt=3)[2], folder)


def test_a_changed_file_of_the_same_name_and_length_is_sent(run: Run, same_folder: Same) -> None:
    writer, store = started(run)
    writer.commit(10, saved(run, 10), world_size=1)
    folder = saved(run, 20, FROZEN[::-1])
    writer.commit(20, folder, world_size=1)
    assert (store.copied, [name for name in store.sent if "20/tok" in name]) == ([], ["20/tokenizer.json"])
    assert same_folder(run.start(attempt=2)[2], folder)


@pytest.mark.parametrize("damage", [Path.unlink, damage_cut, damage_flip])
def test_a_stored_file_that_was_damaged_is_sent_again(
    run: Run, same_folder: Same, damage: Callable[[Path], object]
) -> None:
    writer, store = started(run)
    writer.commit(10, saved(run, 10), world_size=1)
    damage(run.place.folder / "checkpoints/fence-1/step-10/tokenizer.json")
    folder = saved(run, 20)
    writer.commit(20, folder, world_size=1)
    assert (store.copied, [name for name in store.sent if "20/tok" in name]) == ([], ["20/tokenizer.json"])
    assert same_folder(run.start(attempt=2)[2], folder)


def test_small_files_are_sent_each_time(run: Run) -> None:
    writer, store = started(run)
    for step in (10, 20):
        writer.commit(step, saved(run, step, FROZEN[: files.SMALLEST_COPY - 1]), world_size=1)
    assert store.copied == []


def test_a_copy_is_true_only_for_the_very_content(place: Place) -> None:
    place.store.put(f"{place.prefix}/a", b"one")
    other = hashlib.sha256(b"two").hexdigest()
    assert not place.store.copy(f"{place.prefix}/a", f"{place.prefix}/b", other)
    assert not place.store.copy(f"{place.prefix}/none", f"{place.prefix}/c", other)
