"""The published result: whole and listed, or not there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from finetune_trainer.store.artifacts import publish, read_artifact
from finetune_trainer.store.errors import CheckpointInvalid, StorageUnavailable, Superseded
from finetune_trainer.store.objects import join_key
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Run


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "artifact"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "report.json").write_text("{}")
    return folder


def test_the_result_lies_below_the_output_with_its_list(run: Run, result: Path) -> None:
    _, writer, _ = run.start()
    published = publish(writer, result)
    assert run.place.list_keys() == [
        "ARTIFACT.json",
        "adapter/adapter_model.safetensors",
        "fences/1",
        "fences/1.taken",
        "report.json",
    ]
    assert read_artifact(run.place.store, run.place.prefix) == published
    assert [(file.name, file.size, file.sha256) for file in published.files] == [
        ("adapter/adapter_model.safetensors", 7, hashlib.sha256(b"weights").hexdigest()),
        ("report.json", 2, hashlib.sha256(b"{}").hexdigest()),
    ]
    assert (published.job_uid, published.attempt, published.fence) == ("uid-a", 1, 1)


def test_nothing_is_published_until_the_end(run: Run, result: Path) -> None:
    class Failing(Between):
        def put(self, key: str, data: bytes | Path) -> None:
            if key.endswith("report.json"):
                raise StorageUnavailable("no answer")
            self.real.put(key, data)

    start, writer, _ = run.start()
    assert read_artifact(run.place.store, run.place.prefix) is None
    failing = CheckpointWriter(Failing(run.place.store), run.place.prefix, start.fence)
    with pytest.raises(StorageUnavailable):
        publish(failing, result)
    assert read_artifact(run.place.store, run.place.prefix) is None
    # The same again, over an earlier result: the old list never stands beside new files.
    publish(writer, result)
    with pytest.raises(StorageUnavailable):
        publish(failing, result)
    assert read_artifact(run.place.store, run.place.prefix) is None


def test_an_attempt_that_was_cut_off_cannot_publish(run: Run, result: Path) -> None:
    _, old, _ = run.start(attempt=1)
    _, new, _ = run.start(attempt=2)
    publish(new, result)
    (result / "report.json").write_text('{"old": true}')
    with pytest.raises(Superseded):
        publish(old, result)
    assert run.place.store.get(join_key(run.place.prefix, "report.json")) == b"{}"
    artifact = read_artifact(run.place.store, run.place.prefix)
    assert artifact is not None and artifact.attempt == 2


def test_an_attempt_overtaken_in_mid_publish_overwrites_nothing_more(run: Run, result: Path) -> None:
    class Overtaken(Between):
        def put(self, key: str, data: bytes | Path) -> None:
            self.real.put(key, data)
            run.start(attempt=2)

    start, _, _ = run.start(attempt=1)
    with pytest.raises(Superseded):
        publish(CheckpointWriter(Overtaken(run.place.store), run.place.prefix, start.fence), result)
    assert [key for key in run.place.list_keys() if "fences" not in key] == ["adapter/adapter_model.safetensors"]


def test_a_published_file_that_is_gone_or_cut_is_told(run: Run, result: Path) -> None:
    _, writer, _ = run.start()
    publish(writer, result)
    key = join_key(run.place.prefix, "report.json")
    run.place.store.put(key, b"{")
    with pytest.raises(CheckpointInvalid, match=r"report\.json has 1 bytes, but 2"):
        read_artifact(run.place.store, run.place.prefix)
    run.place.store.delete(key)
    with pytest.raises(CheckpointInvalid, match=r"report\.json was published, but is missing"):
        read_artifact(run.place.store, run.place.prefix)


@pytest.mark.parametrize(
    "name", ["CLAIM.json", "CLAIM-7.json", "ARTIFACT.json", "fences/9", "checkpoints/x", "removals/1"]
)
def test_a_result_cannot_overwrite_the_stores_own_records(run: Run, result: Path, name: str) -> None:
    _, writer, _ = run.start()
    (result / name).parent.mkdir(exist_ok=True)
    (result / name).write_text("{}")
    with pytest.raises(ValueError, match="name of the store's own"):
        publish(writer, result)
    assert run.place.list_keys() == ["fences/1", "fences/1.taken"]
