"""Which errors of the storage end a run, and after how long. Uploads run in this process, on a clock of the test's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.agent import uploads
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.serving import StartBoard
from finetune_trainer.agent.uploads import CheckpointPolicy, CheckpointUploader
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.store.checkpoints import start_attempt
from finetune_trainer.store.errors import (
    BucketNotFound,
    CredentialsRejected,
    DiskFull,
    StorageMisconfigured,
    StorageUnavailable,
    StoreError,
)
from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.agent.test_agent_parts import Log, save

EXPIRED = CredentialsRejected("cannot write: the session token is no longer valid. Renew it.", code="ExpiredToken")
NO_ANSWER = StorageUnavailable("no answer")


class Moody(LocalStore):
    """Takes nothing while it has an error."""

    error: StoreError | None = None

    def put(self, key: str, data: bytes | Path) -> None:
        if self.error is not None:
            raise self.error
        super().put(key, data)


@dataclasses.dataclass
class Uploads:
    """The uploads of one attempt, whose patience is 600 s."""

    store: Moody
    work: WorkDir
    uploader: CheckpointUploader
    clock: SimpleNamespace

    def attempt(self, second: float, error: StoreError | None) -> FinetuneError | None:
        """One try to store a new step at that second; why the attempt has to end now, if it does."""
        self.clock.now, self.store.error = second, error
        save(self.work, 0, int(second) + 1, [])
        try:
            self.uploader.flush()
        except StoreError as raised:
            assert raised is error
        return self.uploader.fatal


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(uploads, "time", clock)
    store, work = Moody(tmp_path), WorkDir(tmp_path / "work")
    work.prepare()
    start = start_attempt(store, "out", job_uid="u", attempt=0, restore_to=None)
    board, policy = ProgressBoard(0), CheckpointPolicy(world_size=1, keep_last=1, run_digest="d", storage_seconds=600)
    writer = CheckpointWriter(store, "out", start.fence)
    uploader = CheckpointUploader(work, writer, policy, board, Metrics(board), StartBoard(), Log())
    return Uploads(store, work, uploader, clock)


def test_a_refusal_of_every_upload_for_the_whole_patience_ends_the_run(made: Uploads) -> None:
    assert made.attempt(0, None) is None
    assert made.attempt(1000, EXPIRED) is None
    assert made.attempt(1599, EXPIRED) is None
    fatal = made.attempt(1600, EXPIRED)
    assert fatal is not None
    assert (fatal.failure_class, fatal.field) == ("CredentialsRejected", "spec.credentials")
    assert str(fatal) == (
        f"{EXPIRED} Training ended because the storage refused every upload for 600 s; the checkpoint of step 1 is stored."
    )


@pytest.mark.parametrize("between", [None, NO_ANSWER])
def test_patience_begins_anew_after_a_success_and_after_an_outage(made: Uploads, between: StoreError | None) -> None:
    assert made.attempt(0, EXPIRED) is None
    assert made.attempt(500, between) is None
    assert made.attempt(700, EXPIRED) is None
    assert made.attempt(1299, EXPIRED) is None
    assert made.attempt(1300, EXPIRED) is not None


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (EXPIRED, True),
        (BucketNotFound("NoSuchBucket"), True),
        (StorageMisconfigured("another region"), True),
        (NO_ANSWER, False),
        (DiskFull("no space"), False),
    ],
)
def test_only_what_the_user_has_to_mend_ends_a_run(made: Uploads, error: StoreError, ends: bool) -> None:
    made.attempt(0, error)
    fatal = made.attempt(10_000, error)
    assert (fatal is not None) is ends
    assert fatal is None or fatal.failure_class == error.failure_class
