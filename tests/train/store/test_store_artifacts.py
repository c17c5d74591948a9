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


def test_a_damaged_list_is_replaced(run: Run, result: Path) -> None:
    _, writer, _ = run.start()
    run.place.store.put(join_key(run.place.prefix, "ARTIFACT.json"), b"{")
    assert publish(writer, result) == read_artifact(run.place.store, run.place.prefix)


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
    # Other files over an earlier result: the old list never stands beside new files.
    publish(writer, result)
    (result / "report.json").write_text('{"new": true}')
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


def test_a_lost_answer_to_the_list_does_not_unpublish_when_it_is_tried_again(run: Run, result: Path) -> None:
    """Somebody may have seen the list meanwhile, and have told that the run succeeded."""

    changed: list[str] = []

    class Lost(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.real.put_if_absent(key, data)
            raise StorageUnavailable("no answer")

        def put(self, key: str, data: bytes | Path) -> None:
            changed.append(key)
            self.real.put(key, data)

        def delete(self, key: str) -> None:
            changed.append(key)
            self.real.delete(key)

    start, _, _ = run.start()
    writer = CheckpointWriter(Lost(run.place.store), run.place.prefix, start.fence)
    with pytest.raises(StorageUnavailable):
        publish(writer, result)
    told = read_artifact(run.place.store, run.place.prefix)
    assert told is not None
    changed.clear()
    assert publish(writer, result) == told
    assert changed == []
    assert read_artifact(run.place.store, run.place.prefix) == told


def test_an_earlier_attempts_list_that_arrives_late_takes_no_place(run: Run, result: Path) -> None:
    """It was sent before a newer attempt started, and arrives after that one has published."""
    start, _, _ = run.start(attempt=1)

    class Late(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            _, new, _ = run.start(attempt=2)
            (result / "report.json").write_text('{"new": true}')
            publish(new, result)
            return bool(self.real.put_if_absent(key, data))

    with pytest.raises(Superseded):
        publish(CheckpointWriter(Late(run.place.store), run.place.prefix, start.fence), result)
    artifact = read_artifact(run.place.store, run.place.prefix)
    assert artifact is not None and artifact.attempt == 2


def test_an_earlier_attempts_list_that_arrives_in_mid_publish_is_replaced(run: Run, result: Path) -> None:
    late: list[bytes] = []

    class Never(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            late.append(data)
            raise StorageUnavailable("no answer")

    class Beside(Between):
        def put(self, key: str, data: bytes | Path) -> None:
            self.real.put(key, data)
            if late:
                self.real.put_if_absent(join_key(run.place.prefix, "ARTIFACT.json"), late.pop())

    old, _, _ = run.start(attempt=1)
    with pytest.raises(StorageUnavailable):
        publish(CheckpointWriter(Never(run.place.store), run.place.prefix, old.fence), result)
    new, _, _ = run.start(attempt=2)
    (result / "report.json").write_text('{"new": true}')
    writer = CheckpointWriter(Beside(run.place.store), run.place.prefix, new.fence)
    with pytest.raises(StorageUnavailable, match=r"ARTIFACT\.json was changed by an attempt that was cut off"):
        publish(writer, result)
    published = publish(writer, result)
    assert published.attempt == 2
    assert read_artifact(run.place.store, run.place.prefix) == published


def test_a_file_that_an_earlier_attempt_replaces_in_mid_publish_is_not_vouched_for(run: Run, result: Path) -> None:
    key = join_key(run.place.prefix, "adapter/adapter_model.safetensors")

    class Beside(Between):
        """Where the upload that an older attempt had begun ends before the newer one's last file."""

        def put(self, where: str, data: bytes | Path) -> None:
            self.real.put(where, data)
            if where.endswith("report.json"):
                self.real.put(key, b"othersX")

    start, writer, _ = run.start()
    with pytest.raises(StorageUnavailable, match=r"adapter_model\.safetensors was changed"):
        publish(CheckpointWriter(Beside(run.place.store), run.place.prefix, start.fence), result)
    assert read_artifact(run.place.store, run.place.prefix) is None
    publish(writer, result)
    assert run.place.store.get(key) == b"weights"


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
