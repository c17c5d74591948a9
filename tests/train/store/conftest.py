"""Both kinds of store, with the same tests over each: a real S3 server over HTTP, and a local folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.store.checkpoints import Start, list_checkpoints, start_attempt
from finetune_trainer.store.objects import ObjectStore, S3Settings, open_store
from finetune_trainer.store.writer import CheckpointWriter
from tests.cluster.s3 import S3Server

Same = Callable[[Path, Path], bool]

_numbers = itertools.count()


class Between:
    """Passes every call on to a real store or client; a test's own class alters some."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for all tests; each test has a prefix of its own."""
    with S3Server() as server:
        server.add_user("team-a")
        server.create_bucket("team-a", owner="team-a")
        yield server


@pytest.fixture
def settings(s3: S3Server) -> S3Settings:
    """How the bucket's owner reaches the server."""
    return S3Settings(
        endpoint=s3.endpoint, access_key_id="team-a", secret_access_key=s3.users["team-a"], session_token=None
    )


@dataclass(frozen=True)
class Place:
    """An empty prefix of a store, and the files behind it, for tests that damage what is stored."""

    store: ObjectStore
    prefix: str
    folder: Path

    def list_keys(self) -> list[str]:
        """All keys below the prefix, relative to it, sorted."""
        return sorted(item.key.removeprefix(self.prefix + "/") for item in self.store.list(self.prefix + "/"))


@pytest.fixture(params=["s3", "local"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty output in each kind of store."""
    if request.param == "local":
        store, prefix = open_store((tmp_path / "stored" / "faq").as_uri())
        return Place(store, prefix, tmp_path / "stored" / "faq")
    server: S3Server = request.getfixturevalue("s3")
    name = f"models/faq-{next(_numbers)}"
    store, prefix = open_store(f"s3://team-a/{name}", request.getfixturevalue("settings"))
    return Place(store, prefix, server.data / "team-a" / name)


@dataclass(frozen=True)
class Run:
    """One job that writes to a place; its folders are below work."""

    place: Place
    work: Path

    def start(self, attempt: int = 1, max_step: int | None = None) -> tuple[Start, CheckpointWriter, Path]:
        """Starts an attempt; returns it, its writer and the folder it restored to."""
        target = self.work / f"resume-{next(_numbers)}"
        start = start_attempt(
            self.place.store,
            self.place.prefix,
            job_uid="uid-a",
            attempt=attempt,
            restore_to=target,
            max_step=max_step,
        )
        return start, CheckpointWriter(self.place.store, self.place.prefix, start.fence), target

    def saved(self, step: int, note: str = "") -> Path:
        """A local checkpoint folder whose content belongs to the step."""
        folder = self.work / f"saved-{step}-{next(_numbers)}"
        (folder / "optimizer").mkdir(parents=True)
        (folder / "adapter.safetensors").write_bytes(f"weights of {step} {note}".encode() * 100)
        (folder / "optimizer" / "rank_0.safetensors").write_bytes(f"state of {step}".encode())
        return folder


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Run:
    """A job at the empty place."""
    work = tmp_path / "work"
    work.mkdir()
    return Run(place, work)


def committed(run: Run, *steps: int, attempt: int = 1) -> tuple[CheckpointWriter, dict[int, Path]]:
    """Starts an attempt that commits the steps; returns its writer and the folders."""
    _, writer, _ = run.start(attempt)
    folders = {step: run.saved(step) for step in steps}
    for step, folder in folders.items():
        writer.commit(step, folder, world_size=1)
    return writer, folders


def steps(place: Place) -> list[int]:
    """The steps of the checkpoints that count, newest first."""
    return [checkpoint.step for checkpoint in list_checkpoints(place.store, place.prefix)]


def damage_flip(part: Path) -> None:
    """One bit is not what was written."""
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def damage_cut(part: Path) -> None:
    """The end is gone."""
    part.write_bytes(part.read_bytes()[:-1])


@pytest.fixture
def same_folder() -> Same:
    """Whether two folders hold the same files, byte by byte."""

    def content(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return lambda one, other: content(one) == content(other) != {}
