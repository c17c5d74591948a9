"""Damage: nothing broken is ever resumed from, and whoever looks is told what broke."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.store.documents import Fence, Manifest
from finetune_trainer.store.errors import (
    CheckpointInvalid,
    StorageUnavailable,
)
from finetune_trainer.store.objects import join_key
from tests.train.store.conftest import Between, Place, Run, Same, committed, damage_cut, damage_flip, steps


@pytest.mark.parametrize(
    ("damage", "told"),
    [(damage_flip, "was altered"), (damage_cut, "has 1399 bytes"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("newer_fence", [False, True])
def test_a_damaged_part_is_told_and_the_older_checkpoint_taken(
    run: Run, same_folder: Same, damage: Callable[[Path], None], told: str, newer_fence: bool
) -> None:
    _, folders = committed(run, 10, 20)
    if newer_fence:
        run.start(attempt=2)
    damage(run.place.folder / "checkpoints/fence-1/step-20/adapter.safetensors")
    start, writer, target = run.start(attempt=3)
    assert start.resumed is not None and start.resumed.step == 10 == writer.newest_step
    assert same_folder(target, folders[10])
    assert [path for path in run.work.iterdir() if ".partial" in path.name] == []
    assert [(entry.fence, entry.step) for entry in start.skipped] == [(1, 20)]
    assert told in start.skipped[0].reason and "step-20/adapter.safetensors" in start.skipped[0].reason
    stored = Fence.read(run.place.store, join_key(run.place.prefix, f"fences/{start.fence.fence}"))
    assert stored.base == start.resumed.ref and stored.skipped == start.skipped
    # The run goes on from 10: steps may be taken again, and the damaged one never comes back.
    writer.commit(15, run.saved(15), world_size=1)
    assert steps(run.place) == [15, 10]


def _edit(manifest: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(manifest.read_bytes())
    change(document)
    manifest.write_text(json.dumps(document))


MANIFEST_DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": damage_cut,
    "empty": lambda path: path.write_bytes(b""),
    "unknown field": lambda path: _edit(path, lambda document: document.update(extra=1)),
    "loose type": lambda path: _edit(path, lambda document: document.update(step="20")),
    "escaping part": lambda path: _edit(path, lambda document: document["parts"][0].update(name="../../../x")),
    "absolute part": lambda path: _edit(path, lambda document: document["parts"][0].update(name="/etc/x")),
    "part twice": lambda path: _edit(path, lambda document: document["parts"].append(document["parts"][0])),
    "of another step": lambda path: _edit(path, lambda document: document.update(step=21)),
    "too large": lambda path: path.write_bytes(path.read_bytes() + b" " * (5 << 20)),
}


@pytest.mark.parametrize("kind", MANIFEST_DAMAGE)
@pytest.mark.parametrize("newer_fence", [False, True])
def test_a_checkpoint_without_a_valid_manifest_does_not_exist(run: Run, kind: str, newer_fence: bool) -> None:
    committed(run, 10, 20)
    if newer_fence:
        run.start(attempt=2)
    MANIFEST_DAMAGE[kind](run.place.folder / "checkpoints/fence-1/step-20/MANIFEST.json")
    assert steps(run.place) == [10]
    start, _, _ = run.start(attempt=3)
    assert start.resumed is not None and start.resumed.step == 10
    assert [entry.step for entry in start.skipped] == [20]
    assert "step-20/MANIFEST.json" in start.skipped[0].reason


def test_a_valid_manifest_put_in_place_of_the_recorded_one_is_refused(run: Run) -> None:
    committed(run, 10, 20)
    run.start(attempt=2)
    path = run.place.folder / "checkpoints/fence-1/step-20/MANIFEST.json"
    _edit(path, lambda document: document.update(worldSize=2))
    Manifest.parse(path.read_bytes(), "still valid by itself")
    start, _, _ = run.start(attempt=3)
    assert start.resumed is not None and start.resumed.step == 10
    assert "altered after it was committed" in start.skipped[0].reason


def test_when_no_checkpoint_is_whole_every_start_says_so(run: Run) -> None:
    committed(run, 10, 20)
    for step in (10, 20):
        damage_flip(run.place.folder / f"checkpoints/fence-1/step-{step}/adapter.safetensors")
    for attempt in (2, 3):
        with pytest.raises(CheckpointInvalid, match=r"none of the .*whole.*new output\.uri"):
            run.start(attempt)


def test_a_checkpoints_folder_that_vanished_is_no_fresh_start(run: Run) -> None:
    committed(run, 10)
    run.start(attempt=2)
    for item in list(run.place.store.list(join_key(run.place.prefix, "checkpoints/") + "/")):
        run.place.store.delete(item.key)
    with pytest.raises(CheckpointInvalid, match="manifest is missing"):
        run.start(attempt=3)


def test_a_damaged_fence_record_is_told(run: Run) -> None:
    committed(run, 10)
    damage_cut(run.place.folder / "fences/1")
    with pytest.raises(CheckpointInvalid, match="fences/1 is not a valid Fence"):
        run.start(attempt=2)


def test_an_outage_during_restore_is_not_taken_for_damage(run: Run) -> None:
    """Otherwise one bad minute of the network would throw the newest checkpoint away."""
    committed(run, 10, 20)

    class Down(Between):
        def download(self, key: str, path: Path) -> None:
            raise StorageUnavailable("no answer")

    place = Place(Down(run.place.store), run.place.prefix, run.place.folder)
    with pytest.raises(StorageUnavailable):
        Run(place, run.work).start(attempt=2)
    start, _, _ = run.start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 20 and start.skipped == ()


def test_damage_to_a_file_that_never_changes_spoils_one_checkpoint_only(run: Run, same_folder: Same) -> None:
    _, writer, _ = run.start()
    folders = {step: run.saved(step) for step in (10, 20)}
    for step, folder in folders.items():
        (folder / "config.json").write_bytes(b"the same in each" * 500_000)
        writer.commit(step, folder, world_size=1)
    damage_flip(run.place.folder / "checkpoints/fence-1/step-20/config.json")
    start, _, target = run.start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 10 and same_folder(target, folders[10])
    assert "step-20/config.json was altered" in start.skipped[0].reason
