"""Several files are on their way at once, and the first error ends the rest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.store import files
from finetune_trainer.store.documents import FileEntry
from finetune_trainer.store.errors import CheckpointInvalid, StorageUnavailable
from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.objects import S3Settings
from finetune_trainer.store.s3 import S3Store, s3_client
from tests.train.store.conftest import Between

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of files."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"part-{number:02}").write_bytes(f"{number}".encode() * 1000)
    return folder


class Meeting(LocalStore):
    """Each transfer waits until as many others are under way as may be."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.barrier = threading.Barrier(files.AT_ONCE)

    def put(self, key: str, data: bytes | Path) -> None:
        self.barrier.wait(timeout=20)
        super().put(key, data)

    def download(self, key: str, path: Path) -> None:
        self.barrier.wait(timeout=20)
        super().download(key, path)


def test_files_go_up_and_down_at_the_same_time(folder: Path, tmp_path: Path) -> None:
    """It would never end one by one, nor with more at once than there is room for."""
    store = Meeting(tmp_path / "stored")
    found = files.scan(folder)
    files.upload_all(store, [(file.entry.name, file) for file in found])
    entries: list[tuple[str, FileEntry]] = [(file.entry.name, file.entry) for file in found]
    files.download(store, entries, tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_first_error_of_an_upload_ends_it(folder: Path, tmp_path: Path) -> None:
    class Failing(LocalStore):
        begun = 0

        def put(self, key: str, data: bytes | Path) -> None:
            self.begun += 1
            raise StorageUnavailable(f"no answer for {key}")

    store = Failing(tmp_path / "stored")
    with pytest.raises(StorageUnavailable, match="no answer for part-"):
        files.upload_all(store, [(file.entry.name, file) for file in files.scan(folder)])
    assert 1 <= store.begun <= files.AT_ONCE < COUNT


def test_the_first_damaged_file_ends_a_download_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "stored")
    found = files.scan(folder)
    files.upload_all(store, [(file.entry.name, file) for file in found])
    store.put("part-05", b"another")
    with pytest.raises(CheckpointInvalid, match="part-05 has 7 bytes"):
        files.download(store, [(file.entry.name, file.entry) for file in found], tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "stored"]


def test_a_listing_goes_on_over_several_pages(settings: S3Settings) -> None:
    class ShortPages(Between):
        def list_objects_v2(self, **arguments: Any) -> Any:
            return self.real.list_objects_v2(MaxKeys=2, **arguments)

    store = S3Store(ShortPages(s3_client(settings)), "team-a")
    for number in range(5):
        store.put(f"pages/{number}", b"x")
    assert [item.key for item in store.list("pages/")] == [f"pages/{number}" for number in range(5)]
