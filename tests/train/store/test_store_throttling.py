"""A server that is busy or drops connections: what can be tried again is, a bounded number of times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_trainer.store import s3 as s3_module
from finetune_trainer.store.checkpoints import start_attempt
from finetune_trainer.store.errors import StorageUnavailable
from finetune_trainer.store.objects import S3Settings
from finetune_trainer.store.s3 import S3Store, s3_client
from finetune_trainer.store.writer import CheckpointWriter
from tests.cluster.s3 import S3Server
from tests.train.store.faulty_proxy import Choose, FaultyProxy, Trouble


@pytest.fixture
def through(s3: S3Server, settings: S3Settings) -> Callable[[Choose], object]:
    """A store that reaches the server through a proxy that makes requests fail."""

    @contextmanager
    def begin(choose: Choose) -> Iterator[tuple[S3Store, FaultyProxy]]:
        with FaultyProxy(s3.endpoint, choose) as proxy:
            client = s3_client(replace(settings, endpoint=proxy.endpoint), read_timeout=20, longest_wait=0.01)
            yield S3Store(client, "team-a", endpoint=proxy.endpoint, sleep=lambda _: None), proxy

    return begin


def first_two(trouble: Trouble) -> Choose:
    """Each request fails twice, then goes through. Only a request with a body can take the server too long."""

    def choose(method: str, path: str, before: int) -> Trouble | None:
        return trouble if before < 2 and (method == "PUT" or trouble is not Trouble.REQUEST_TIMEOUT) else None

    return choose


@pytest.mark.parametrize("trouble", list(Trouble))
def test_every_operation_outlasts_a_busy_server(through: Callable, trouble: Trouble, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(3000))
    base = f"throttled/{trouble.name}"
    with through(first_two(trouble)) as (store, proxy):
        store.put(f"{base}/bytes", b"some bytes")
        store.put(f"{base}/file", source)
        store.put_if_absent(f"{base}/once", b"mine")
        assert store.get(f"{base}/once") == b"mine"
        store.download(f"{base}/file", copy)
        assert copy.read_bytes() == source.read_bytes()
        assert store.head(f"{base}/bytes").size == 10
        assert sorted(item.key for item in store.list(f"{base}/")) == [
            f"{base}/{name}" for name in ("bytes", "file", "once")
        ]
        store.delete(f"{base}/bytes")
        assert len(list(store.list(f"{base}/"))) == 2
    assert proxy.failed[trouble] >= 6


@pytest.mark.parametrize("trouble", [Trouble.SLOW_DOWN, Trouble.TOO_MANY, Trouble.REQUEST_TIMEOUT, Trouble.RESET])
def test_parts_of_a_large_file_are_tried_again_one_by_one(
    through: Callable, trouble: Trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 5 << 20
    monkeypatch.setattr(s3_module._TRANSFER, "multipart_threshold", small)
    monkeypatch.setattr(s3_module._TRANSFER, "multipart_chunksize", small)
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(3 * small + 7))
    key = f"large/{trouble.name}"
    with through(first_two(trouble)) as (store, proxy):
        store.put(key, source)
        parts = [path for method, path in proxy.seen if method == "PUT" and "partNumber" in path]
        assert len(parts) == 4 and all(proxy.seen["PUT", path] == 3 for path in parts)
        store.download(key, copy)
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("trouble", [Trouble.SLOW_DOWN, Trouble.TOO_MANY, Trouble.RESET])
def test_a_server_that_stays_busy_is_told_after_a_bounded_number_of_tries(through: Callable, trouble: Trouble) -> None:
    with through(lambda method, path, before: trouble) as (store, proxy):
        with pytest.raises(StorageUnavailable, match="throttled/always") as caught:
            store.put("throttled/always", b"x")
    assert proxy.failed[trouble] == s3_module.TRIES
    assert caught.value.failure_class == "StorageUnavailable"


def test_a_refusal_is_not_tried_again(through: Callable) -> None:
    with through(lambda method, path, before: None) as (store, proxy):
        assert store.put_if_absent("throttled/taken", b"1") is True
        assert store.put_if_absent("throttled/taken", b"2") is False
    assert proxy.seen["PUT", "/team-a/throttled/taken"] == 2


def test_a_checkpoint_goes_through_a_server_where_each_request_fails_once(through: Callable, tmp_path: Path) -> None:
    """Also the conditional writes whose answer is lost: the fence and the manifest are found to be one's own."""
    troubles = list(Trouble)

    def choose(method: str, path: str, before: int) -> Trouble | None:
        trouble = troubles[len(path) % len(troubles)]
        return trouble if before == 0 and (method == "PUT" or trouble is not Trouble.REQUEST_TIMEOUT) else None

    folder = tmp_path / "saved"
    folder.mkdir()
    for number in range(6):
        (folder / f"part-{number}").write_bytes(os.urandom(5000))
    with through(choose) as (store, proxy):
        start = start_attempt(store, "throttled/run", job_uid="a", attempt=1, restore_to=tmp_path / "none")
        writer = CheckpointWriter(store, "throttled/run", start.fence)
        writer.commit(1, folder, world_size=1)
        again = start_attempt(store, "throttled/run", job_uid="a", attempt=2, restore_to=tmp_path / "back")
    assert again.resumed is not None and again.resumed.step == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert len(proxy.failed) >= 4


def test_two_processes_do_not_wait_equally_long() -> None:
    waits = {s3_module.wait_seconds(tries=4, longest=20.0) for _ in range(20)}
    assert len(waits) == 20 and all(0 <= wait <= 8 for wait in waits)
    assert all(s3_module.wait_seconds(tries=30, longest=20.0) <= 20 for _ in range(20))
