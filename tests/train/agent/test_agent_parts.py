"""A part that a node cannot bring costs its step and no other; a best step that was lost so does not end a resume.

Both nodes' uploads run in this process, on one folder as the output.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.agent import node_uploads, uploads
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.node_uploads import NodeUploads
from finetune_trainer.agent.output_store import restore_best
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.serving import StartBoard
from finetune_trainer.agent.uploads import CheckpointPolicy, CheckpointUploader
from finetune_trainer.agent.workdir import WorkDir, read_json, write_whole
from finetune_trainer.store import nodes as nodes_module
from finetune_trainer.store.checkpoints import list_checkpoints, restore, start_attempt
from finetune_trainer.store.errors import StorageUnavailable
from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.nodes import NodeUploader
from finetune_trainer.store.writer import CheckpointWriter

LOSSES = {10: 1.2, 20: 1.0, 30: 1.5}


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **said: Any) -> None:
        self.lines.append((event, said))

    warning = info

    def of(self, event: str) -> list[dict[str, Any]]:
        return [said for name, said in self.lines if name == event]


class Refusing(LocalStore):
    """Takes nothing that belongs to a step, as often as said."""

    step, left = 0, 0

    def put(self, key: str, data: bytes | Path) -> None:
        if f"step-{self.step}/" in key and self.left > 0:
            self.left -= 1
            raise StorageUnavailable("no answer")
        super().put(key, data)


def save(work: WorkDir, node: int, step: int, best: list[int]) -> None:
    """What the workers of a node leave at a step. A run keeps one best step."""
    folder = work.checkpoints / f"step-{step}"
    folder.mkdir()
    (folder / f"rank-{node}.bin").write_text(f"rank {node} after step {step}")
    if node == 0:
        history = [{"step": done, "eval_loss": loss} for done, loss in LOSSES.items() if done <= step]
        (folder / "plan.json").write_text(json.dumps({"step": step}))
        (folder / "run.json").write_text(json.dumps({"best": [[at, LOSSES[at]] for at in best], "waited": 1}))
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_whole(folder.with_suffix(".ready"), json.dumps({"step": step, "metrics": {}, "best": best}))


@dataclass
class Gang:
    """Node 0 and node 1 of one attempt; node 0 would wait ten minutes for a part."""

    root: Path
    theirs: Refusing = field(init=False)
    works: tuple[WorkDir, WorkDir] = field(init=False)
    log: Log = field(default_factory=Log)
    told: StartBoard = field(default_factory=StartBoard)

    def __post_init__(self) -> None:
        self.store, self.theirs = LocalStore(self.root), Refusing(self.root)
        self.works = WorkDir(self.root / "work-0"), WorkDir(self.root / "work-1")
        for work in self.works:
            work.prepare()
        start = start_attempt(self.store, "out", job_uid="u", attempt=0, restore_to=self.root / "restored")
        board, told = ProgressBoard(0), self.told
        policy = CheckpointPolicy(world_size=2, keep_last=1, run_digest="d", nodes=2, nodes_seconds=600)
        writer = CheckpointWriter(self.store, "out", start.fence)
        self.uploader = CheckpointUploader(self.works[0], writer, policy, board, Metrics(board), told, self.log)
        uploader = NodeUploader(self.theirs, "out", start.fence.fence, 1)
        self.uploads = NodeUploads(
            self.works[1], uploader, lambda: {"storing": told.storing, "stored": told.stored}, self.log
        )
        self.uploads.start()

    def save(self, step: int, best: list[int]) -> None:
        """Both nodes have a checkpoint of the step."""
        for node, work in enumerate(self.works):
            save(work, node, step, best)

    def store_newest(self, seconds: float = 30.0) -> None:
        """Node 0 stores what it has, or gives it up; it must not take the ten minutes."""
        thread = threading.Thread(target=self.uploader.flush, daemon=True)
        thread.start()
        thread.join(seconds)
        assert not thread.is_alive(), "node 0 still waits for node 1's part"

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in list_checkpoints(self.store, "out")]

    def resume(self) -> WorkDir:
        """What the next attempt finds of the newest checkpoint and of the best one."""
        work = WorkDir(self.root / "next")
        work.root.mkdir()
        restore(self.store, "out", list_checkpoints(self.store, "out")[0].ref, work.resume)
        restore_best(self.store, "out", work, self.log)
        return work


@pytest.fixture
def gang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gang]:
    for module, name in (
        (node_uploads, "_POLL_SECONDS"),
        (node_uploads, "_RETRY_SECONDS"),
        (nodes_module, "_POLL_SECONDS"),
        (uploads, "_RETRY_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.01)
    gang = Gang(tmp_path)
    yield gang
    start_attempt(gang.store, "out", job_uid="u", attempt=9, restore_to=None)  # ends node 1's thread
    save(gang.works[1], 1, 99, [])
    gang.told.storing = 99
    gang.uploads.join(10)
    assert not gang.uploads.is_alive()


def no_part(gang: Gang) -> None:
    """Node 1 has made a later checkpoint only."""
    save(gang.works[0], 0, 10, [])
    save(gang.works[1], 1, 20, [])


def refused(gang: Gang) -> None:
    """Node 1's storage takes nothing of step 10, and a later checkpoint is complete."""
    gang.theirs.step, gang.theirs.left = 10, 1000
    gang.save(10, [])
    save(gang.works[1], 1, 20, [])


def unfit(gang: Gang) -> None:
    """Node 1's files of step 10 are none that a store takes."""
    save(gang.works[0], 0, 10, [])
    save(gang.works[1], 1, 20, [])
    folder = gang.works[1].checkpoints / "step-10"
    folder.mkdir()
    (folder / "link").symlink_to(folder)
    write_whole(folder.with_suffix(".ready"), json.dumps({"step": 10}))


@pytest.mark.parametrize("trouble", [no_part, refused, unfit])
def test_a_part_that_does_not_come_is_given_up_and_the_next_step_is_stored(
    gang: Gang, trouble: Callable[[Gang], None]
) -> None:
    trouble(gang)
    gang.store_newest()
    assert gang.steps == []
    assert [said["step"] for said in gang.log.of("a node's part is missing")] == [10]
    save(gang.works[0], 0, 20, [])
    gang.store_newest()
    assert gang.steps == [20]
    names = {part.name for part in list_checkpoints(gang.store, "out")[0].manifest.parts}
    assert {"rank-0.bin", "rank-1.bin"} <= names


def test_workers_that_ended_without_a_step_are_not_waited_for(gang: Gang) -> None:
    """Node 1 stays until node 0's end: its ranks may have failed for a reason to which node 0 has an answer."""
    gang.save(10, [])
    gang.store_newest()
    save(gang.works[0], 0, 20, [])
    threading.Thread(target=gang.uploads.flush, kwargs={"until_its_end": True}, daemon=True).start()
    gang.store_newest()
    assert gang.steps == [10]
    assert [said["step"] for said in gang.log.of("a node's part is missing")] == [20]
    [given_up] = gang.log.of("checkpoint part given up")
    assert given_up == {"step": 20, "why": "the workers of this node ended before they had made it"}


def test_workers_that_ended_with_the_step_bring_their_part(gang: Gang) -> None:
    gang.save(10, [])
    threading.Thread(target=gang.uploads.flush, kwargs={"until_its_end": True}, daemon=True).start()
    gang.store_newest()
    assert gang.steps == [10]


def test_a_best_step_is_not_given_up_for_a_passing_failure(gang: Gang) -> None:
    gang.theirs.step, gang.theirs.left = 10, 3
    gang.save(10, [10])
    gang.save(20, [10])
    gang.store_newest()
    assert gang.steps == [20, 10]
    assert gang.log.of("checkpoint part given up") == []


def lose_the_best(gang: Gang) -> None:
    """Steps 10 and 30 are stored; 20, the best of all, is not."""
    gang.save(10, [10])
    gang.store_newest()
    gang.save(20, [20])
    (gang.works[1].checkpoints / "step-20" / "link").symlink_to(gang.root)
    gang.store_newest()
    gang.save(30, [20])
    gang.store_newest()


def test_where_the_best_step_was_given_up_the_one_before_stays_beside_the_newest(gang: Gang) -> None:
    lose_the_best(gang)
    assert gang.steps == [30, 10]
    assert list_checkpoints(gang.store, "out")[0].manifest.meta["best"] == [10]


def test_a_resume_whose_best_step_was_given_up_goes_on_with_the_best_that_is_stored(gang: Gang) -> None:
    lose_the_best(gang)
    work = gang.resume()
    assert read_json(work.resume / "run.json") == {"best": [[10, 1.2]], "waited": 1}
    assert gang.log.of("the best checkpoint is not stored") == [{"step": 20, "instead": 10}]
    assert read_json(work.best / "plan.json") == {"step": 10}
    assert (work.best / "rank-1.bin").read_text() == "rank 1 after step 10"


def test_the_best_that_is_stored_is_told_by_the_runs_metric(gang: Gang) -> None:
    """By loss step 10 is better than 30, by accuracy the other way round."""
    lose_the_best(gang)
    checkpoint = list_checkpoints(gang.store, "out")[0].ref
    assert checkpoint.step == 30
    work = WorkDir(gang.root / "next")
    restore(gang.store, "out", checkpoint, work.resume)
    history = [{"step": step, "eval_loss": LOSSES[step], "eval_accuracy": LOSSES[step]} for step in LOSSES]
    (work.resume / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    carried = {"best": [[20, 2.0]], "best_metric": "accuracy"}
    (work.resume / "run.json").write_text(json.dumps(carried))
    restore_best(gang.store, "out", work, gang.log)
    assert read_json(work.resume / "run.json") == {"best": [[30, 1.5]], "best_metric": "accuracy"}


def test_that_may_be_the_resumed_checkpoint_itself(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, 10, 2.0)
    lose_the_best(gang)
    work = gang.resume()
    assert read_json(work.resume / "run.json") == {"best": [[30, 1.5]], "waited": 1}
    assert gang.log.of("the best checkpoint is not stored") == [{"step": 20, "instead": 30}]
    assert not work.best.exists()


def test_a_best_checkpoint_that_was_damaged_is_passed_over_in_the_same_way(gang: Gang) -> None:
    for step, best in ((10, 10), (20, 20), (30, 20)):
        gang.save(step, [best])
        gang.store_newest()
    assert gang.steps == [30, 20]
    (gang.root / "out/checkpoints/fence-1/step-20/nodes/1/rank-1.bin").write_text("other")
    work = gang.resume()
    assert read_json(work.resume / "run.json") == {"best": [[30, 1.5]], "waited": 1}, "10 is pruned"
    assert [said["step"] for said in gang.log.of("checkpoint is damaged")] == [20]
    assert not work.best.exists()


def test_a_run_without_any_best_checkpoint_left_goes_on(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LOSSES, 30)
    for step in (10, 30):
        gang.save(step, [10])
        gang.store_newest()
    (gang.root / "out/checkpoints/fence-1/step-10/MANIFEST.json").unlink()
    work = gang.resume()
    assert read_json(work.resume / "run.json") == {"best": [], "waited": 1}
    assert gang.log.of("the best checkpoint is not stored") == [{"step": 10, "instead": None}]
    assert not work.best.exists()
