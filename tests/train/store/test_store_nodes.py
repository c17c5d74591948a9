"""Several nodes: a checkpoint has the files of all of them, or it does not exist."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_trainer.store import nodes as nodes_module
from finetune_trainer.store.checkpoints import list_checkpoints
from finetune_trainer.store.errors import CheckpointInvalid, NodeFilesMissing, Superseded
from finetune_trainer.store.layout import checkpoint_prefix
from finetune_trainer.store.nodes import NodeUploader
from finetune_trainer.store.objects import join_key
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Run, damage_cut, damage_flip, steps


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Node 0 looks often."""
    monkeypatch.setattr(nodes_module, "_POLL_SECONDS", 0.01)
    yield


def saved_by(run: Run, node: int, step: int) -> Path:
    """What the ranks of a node leave on its disk: files of its own and one that every node has."""
    folder = run.work / f"node-{node}-step-{step}"
    folder.mkdir()
    (folder / f"rng_state_{node}.safetensors").write_bytes(f"dice of {node} at {step}".encode())
    (folder / "zero").mkdir()
    (folder / "zero" / f"rank_{node}.safetensors").write_bytes(f"moments of {node} at {step}".encode() * 50)
    (folder / "run.json").write_bytes(f"written on node {node}".encode())
    return folder


def uploader(run: Run, writer: CheckpointWriter, node: int) -> NodeUploader:
    return NodeUploader(run.place.store, run.place.prefix, writer.fence.fence, node)


def test_every_node_restores_the_files_of_all_nodes(run: Run) -> None:
    _, writer, _ = run.start()
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(uploader(run, writer, node).upload, 10, saved_by(run, node, 10)) for node in (1, 2)]
        writer.commit(10, saved_by(run, 0, 10), world_size=3, nodes=3, wait_seconds=20)
        for other in others:
            other.result()
    _, _, target = run.start(attempt=2)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    expected = {f"rng_state_{node}.safetensors": f"dice of {node} at 10".encode() for node in range(3)}
    expected |= {f"zero/rank_{node}.safetensors": f"moments of {node} at 10".encode() * 50 for node in range(3)}
    assert found == expected | {"run.json": b"written on node 0"}


def test_without_one_nodes_files_there_is_no_checkpoint(run: Run) -> None:
    _, writer, _ = run.start()
    uploader(run, writer, 2).upload(10, saved_by(run, 2, 10))
    folder = saved_by(run, 0, 10)
    with pytest.raises(NodeFilesMissing, match=r"step 10 is not stored: no files of node 1 after 0.05 s") as caught:
        writer.commit(10, folder, world_size=3, nodes=3, wait_seconds=0.05)
    assert caught.value.failure_class == "CollectiveFailed"
    assert steps(run.place) == [] and writer.newest_step is None
    # The same call goes through once the node has caught up.
    uploader(run, writer, 1).upload(10, saved_by(run, 1, 10))
    writer.commit(10, folder, world_size=3, nodes=3, wait_seconds=20)
    assert steps(run.place) == [10]


def test_a_part_that_its_node_gives_up_ends_the_wait_at_once_and_the_checkpoint_for_good(run: Run) -> None:
    _, writer, _ = run.start()
    uploader(run, writer, 1).upload(10, saved_by(run, 1, 10))
    folder = saved_by(run, 0, 10)
    timer = threading.Timer(0.2, lambda: uploader(run, writer, 2).give_up(10, "its disk is full \udcff"))
    timer.start()
    with pytest.raises(NodeFilesMissing, match=r"step 10 is not stored: node 2 lacks it: its disk is full \\udcff"):
        writer.commit(10, folder, world_size=3, nodes=3, wait_seconds=600)
    timer.join()
    # Whatever node 2 uploads now: it has said that the part does not come, and its word stands.
    with pytest.raises(ValueError, match="node 2 gave step 10 up before"):
        uploader(run, writer, 2).upload(10, saved_by(run, 2, 10))
    with pytest.raises(NodeFilesMissing):
        writer.commit(10, folder, world_size=3, nodes=3, wait_seconds=600)
    assert steps(run.place) == [] and writer.newest_step is None
    for node in (1, 2):
        uploader(run, writer, node).upload(20, saved_by(run, node, 20))
    writer.commit(20, saved_by(run, 0, 20), world_size=3, nodes=3, wait_seconds=20)
    writer.prune(keep_last=1)
    assert steps(run.place) == [20] and [key for key in run.place.list_keys() if "step-10" in key] == []


def test_a_part_that_is_stored_cannot_be_given_up(run: Run) -> None:
    _, writer, _ = run.start()
    uploader(run, writer, 1).upload(10, saved_by(run, 1, 10))
    uploader(run, writer, 1).give_up(10, "the answer to its upload was lost")
    writer.commit(10, saved_by(run, 0, 10), world_size=2, nodes=2, wait_seconds=20)
    assert steps(run.place) == [10]


@pytest.mark.parametrize("document", [b'{"files": []}', b'{"files": [], "missing": ""}', b"{}"])
def test_a_list_that_names_no_file_and_no_reason_is_damage(run: Run, document: bytes) -> None:
    _, writer, _ = run.start()
    base = checkpoint_prefix(run.place.prefix, 1, 10)
    run.place.store.put(join_key(base, "nodes/1.json"), document)
    with pytest.raises(CheckpointInvalid, match="either files, or why there are none"):
        writer.commit(10, saved_by(run, 0, 10), world_size=2, nodes=2, wait_seconds=20)


def test_files_without_the_nodes_list_do_not_count(run: Run) -> None:
    _, writer, _ = run.start()
    base = join_key(checkpoint_prefix(run.place.prefix, 1, 10), "nodes/1")
    run.place.store.put(join_key(base, "rng_state_1.safetensors"), b"half of")
    with pytest.raises(NodeFilesMissing):
        writer.commit(10, saved_by(run, 0, 10), world_size=2, nodes=2, wait_seconds=0.05)


@pytest.mark.parametrize("damage", [Path.unlink, damage_cut])
def test_a_torn_upload_of_a_node_is_not_committed(run: Run, damage: object) -> None:
    _, writer, _ = run.start()
    uploader(run, writer, 1).upload(10, saved_by(run, 1, 10))
    damage(run.place.folder / "checkpoints/fence-1/step-10/nodes/1/zero/rank_1.safetensors")  # type: ignore[operator]
    with pytest.raises(CheckpointInvalid, match=r"nodes/1/zero/rank_1\.safetensors is not as node 1 listed it"):
        writer.commit(10, saved_by(run, 0, 10), world_size=2, nodes=2, wait_seconds=20)
    assert steps(run.place) == []


def test_an_altered_file_of_another_node_makes_the_checkpoint_damaged(run: Run) -> None:
    _, writer, _ = run.start()
    for step in (10, 20):
        uploader(run, writer, 1).upload(step, saved_by(run, 1, step))
        writer.commit(step, saved_by(run, 0, step), world_size=2, nodes=2, wait_seconds=20)
    damage_flip(run.place.folder / "checkpoints/fence-1/step-20/nodes/1/rng_state_1.safetensors")
    start, _, _ = run.start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 10
    assert "nodes/1/rng_state_1.safetensors was altered" in start.skipped[0].reason


def test_a_node_of_an_overtaken_attempt_is_told_and_changes_nothing(run: Run) -> None:
    _, old, _ = run.start(attempt=1)
    run.start(attempt=2)
    before = run.place.list_keys()
    with pytest.raises(Superseded, match="fence 2 has taken"):
        uploader(run, old, 1).upload(10, saved_by(run, 1, 10))
    assert run.place.list_keys() == before


def test_a_waiting_node_0_learns_that_it_was_overtaken(run: Run) -> None:
    _, old, _ = run.start(attempt=1)
    timer = threading.Timer(0.1, lambda: run.start(attempt=2))
    timer.start()
    with pytest.raises(Superseded):
        old.commit(10, saved_by(run, 0, 10), world_size=2, nodes=2, wait_seconds=60)
    timer.join()


def test_what_a_node_listed_is_never_written_again(run: Run) -> None:
    _, writer, _ = run.start()
    folder = saved_by(run, 1, 10)
    uploader(run, writer, 1).upload(10, folder)
    stored = {item.key: item.etag for item in run.place.store.list(run.place.prefix)}
    uploader(run, writer, 1).upload(10, folder)
    assert {item.key: item.etag for item in run.place.store.list(run.place.prefix)} == stored
    (folder / "run.json").write_bytes(b"another")
    with pytest.raises(ValueError, match="node 1 uploaded step 10 before with other content"):
        uploader(run, writer, 1).upload(10, folder)
    assert {item.key: item.etag for item in run.place.store.list(run.place.prefix)} == stored


def test_pruning_spares_what_other_nodes_upload_for_the_next_step(run: Run) -> None:
    _, writer, _ = run.start()
    for step in (10, 20):
        uploader(run, writer, 1).upload(step, saved_by(run, 1, step))
        writer.commit(step, saved_by(run, 0, step), world_size=2, nodes=2, wait_seconds=20)
    uploader(run, writer, 1).upload(30, saved_by(run, 1, 30))
    assert writer.prune(keep_last=1) == (10,)
    assert [key for key in run.place.list_keys() if "step-10" in key] == []
    writer.commit(30, saved_by(run, 0, 30), world_size=2, nodes=2, wait_seconds=20)
    assert [len(c.manifest.parts) for c in list_checkpoints(run.place.store, run.place.prefix)] == [5, 5]


def test_a_nodes_step_that_was_never_committed_is_swept_later(run: Run) -> None:
    _, writer, _ = run.start()
    uploader(run, writer, 1).upload(10, saved_by(run, 1, 10))
    writer.commit(20, run.saved(20), world_size=1)
    assert writer.prune(keep_last=1) == ()
    assert [key for key in run.place.list_keys() if "step-10" in key] == []


def test_the_names_of_the_stores_own_are_refused_on_node_0(run: Run) -> None:
    _, writer, _ = run.start()
    folder = run.saved(10)
    (folder / "nodes").mkdir()
    (folder / "nodes" / "1.json").write_text("{}")
    with pytest.raises(ValueError, match="name of the store's own"):
        writer.commit(10, folder, world_size=1)
    with pytest.raises(ValueError, match="node 0 commits"):
        uploader(run, writer, 0)
