"""Objects: what every store promises, and what a user is told when the storage refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from finetune_api.failures import TABLE
from finetune_trainer.store import errors, s3
from finetune_trainer.store.errors import (
    BucketNotFound,
    ConditionalWriteUnsupported,
    CredentialsRejected,
    DiskFull,
    ObjectNotFound,
    StorageMisconfigured,
    StorageUnavailable,
    StoreError,
)
from finetune_trainer.store.objects import S3Settings, join_key, open_store, read_lines
from finetune_trainer.store.s3 import S3Store, s3_client
from tests.cluster.s3 import S3Server
from tests.train.store.conftest import Between, Place


def test_what_is_put_is_what_is_read(place: Place, tmp_path: Path) -> None:
    key = join_key(place.prefix, "a/b.bin")
    place.store.put(key, b"first")
    place.store.put(key, b"second, longer")
    assert place.store.get(key) == b"second, longer"
    assert place.store.head(key).size == 14
    place.store.download(key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"second, longer"
    assert b"".join(place.store.stream(key, start=8)) == b"longer"
    assert b"".join(place.store.stream(key, start=14)) == b""


def test_an_empty_object_is_an_object(place: Place, tmp_path: Path) -> None:
    key = join_key(place.prefix, "empty")
    place.store.put(key, b"")
    assert place.store.get(key) == b""
    place.store.download(key, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_size == 0


def test_a_file_of_many_parts_comes_back_whole(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "big"
    block = os.urandom(1 << 20)
    with source.open("wb") as file:
        for number in range(2 * s3.PART_BYTES // len(block) + 3):
            file.write(number.to_bytes(8, "big") + block[8:])
    key = join_key(place.prefix, "big")
    place.store.put(key, source)
    place.store.download(key, tmp_path / "copy")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, tmp_path / "copy")]
    assert digests[0] == digests[1]
    assert place.store.head(key).size == source.stat().st_size


def test_listing_takes_the_prefix_as_text_and_sees_folders_within(place: Place) -> None:
    for name in ("data/1", "data/x/2", "database/3"):
        place.store.put(join_key(place.prefix, name), name.encode())

    def names(prefix: str) -> list[str]:
        found = place.store.list(join_key(place.prefix, prefix) + ("/" if prefix.endswith("/") else ""))
        return sorted(item.key.removeprefix(place.prefix + "/") for item in found)

    assert names("data/") == ["data/1", "data/x/2"]
    assert names("data") == ["data/1", "data/x/2", "database/3"]
    assert names("nothing/") == []


def test_the_etag_changes_with_the_content(place: Place) -> None:
    key = join_key(place.prefix, "k")
    place.store.put(key, b"one")
    before = place.store.head(key)
    assert list(place.store.list(key)) == [before]
    place.store.put(key, b"two")
    assert place.store.head(key).etag != before.etag


def test_deleting_twice_is_no_error_and_leaves_nothing(place: Place) -> None:
    key = join_key(place.prefix, "deep/er/k")
    place.store.put(key, b"x")
    place.store.delete(key)
    place.store.delete(key)
    assert place.list_keys() == []
    with pytest.raises(ObjectNotFound, match="deep/er/k"):
        place.store.get(key)
    with pytest.raises(ObjectNotFound):
        place.store.head(key)
    with pytest.raises(ObjectNotFound):
        place.store.download(key, Path("never-written"))


def test_a_conditional_write_never_replaces(place: Place) -> None:
    key = join_key(place.prefix, "claim")
    assert place.store.put_if_absent(key, b"mine") is True
    assert place.store.put_if_absent(key, b"yours") is False
    assert place.store.get(key) == b"mine"
    place.store.delete(key)
    assert place.store.put_if_absent(key, b"yours") is True


def test_of_many_conditional_writers_one_wins(place: Place) -> None:
    key = join_key(place.prefix, "race")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: place.store.put_if_absent(key, b"writer %d" % n), range(8)))
    assert won.count(True) == 1
    assert place.store.get(key) == b"writer %d" % won.index(True)
    assert place.list_keys() == ["race"]


def test_lines_come_whole_across_pieces(place: Place) -> None:
    lines = [json.dumps({"row": n, "text": "x" * (n % 5000)}).encode() for n in range(2000)]
    key = join_key(place.prefix, "train.jsonl")
    place.store.put(key, b"\n".join(lines))
    assert list(read_lines(place.store, key)) == lines
    place.store.put(key, b"a\n\nb\n")
    assert list(read_lines(place.store, key)) == [b"a", b"", b"b"]


def test_an_endless_line_is_refused_with_its_number(place: Place) -> None:
    key = join_key(place.prefix, "train.jsonl")
    place.store.put(key, b"ok\n" + b"x" * 3_000_000)
    with pytest.raises(StoreError, match=r"train\.jsonl line 2 is longer than 1000 bytes") as caught:
        list(read_lines(place.store, key, limit=1000))
    assert caught.value.failure_class == "DataInvalid"


def test_a_bounded_read_refuses_more(place: Place) -> None:
    key = join_key(place.prefix, "doc")
    place.store.put(key, b"12345")
    assert place.store.get(key, limit=5) == b"12345"
    with pytest.raises(StoreError, match="larger than the 4 bytes"):
        place.store.get(key, limit=4)


# What a user is told


def _error(call: Callable[[], Any], kind: type[StoreError]) -> StoreError:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value


def _calls(store: Any, tmp_path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: store.get("k"),
        lambda: store.put("k", b"x"),
        lambda: store.put("k", Path(__file__)),
        lambda: store.put_if_absent("k", b"x"),
        lambda: list(store.list("k")),
        lambda: store.head("k"),
        lambda: store.download("k", tmp_path / "k"),
        lambda: store.delete("k"),
    ]


def test_an_unknown_key_id_is_told_from_a_wrong_secret(settings: S3Settings, tmp_path: Path) -> None:
    store, _ = open_store("s3://team-a", replace(settings, access_key_id="nobody"))
    for call in _calls(store, tmp_path):
        error = _error(call, CredentialsRejected)
        assert (error.code, error.failure_class) == ("InvalidAccessKeyId", "CredentialsRejected")  # type: ignore[attr-defined]
    store, _ = open_store("s3://team-a", replace(settings, secret_access_key="wrong"))
    for call in _calls(store, tmp_path):
        error = _error(call, CredentialsRejected)
        assert error.code == "SignatureDoesNotMatch"  # type: ignore[attr-defined]
        assert "AWS_SECRET_ACCESS_KEY" in str(error)


def test_a_stranger_is_denied(s3: S3Server, settings: S3Settings, tmp_path: Path) -> None:
    variables = s3.add_user("stranger")
    stranger = replace(settings, access_key_id="stranger", secret_access_key=variables["AWS_SECRET_ACCESS_KEY"])
    store, _ = open_store("s3://team-a", stranger)
    for call in _calls(store, tmp_path):
        error = _error(call, CredentialsRejected)
        assert error.code == "AccessDenied"  # type: ignore[attr-defined]
        assert "'team-a'" in str(error)


def test_a_missing_bucket_is_told_from_a_missing_object(settings: S3Settings, tmp_path: Path) -> None:
    store, _ = open_store("s3://no-such-bucket", settings)
    for call in _calls(store, tmp_path):
        error = _error(call, BucketNotFound)
        assert "'no-such-bucket'" in str(error) and error.failure_class == "BucketNotFound"
    store, _ = open_store("s3://team-a", settings)
    assert "s3://team-a/nope" in str(_error(lambda: store.head("nope"), ObjectNotFound))


def test_a_dead_endpoint_is_named(s3: S3Server, settings: S3Settings, tmp_path: Path) -> None:
    dead = replace(settings, endpoint="http://127.0.0.1:9")
    store = S3Store(s3_client(dead, max_attempts=1), "team-a", endpoint=dead.endpoint)
    for call in _calls(store, tmp_path):
        error = _error(call, StorageUnavailable)
        assert "http://127.0.0.1:9" in str(error) and "storage.endpoint" in str(error)


def test_a_server_without_tls_is_told(s3: S3Server, settings: S3Settings) -> None:
    secure = replace(settings, endpoint=s3.endpoint.replace("http:", "https:"))
    store = S3Store(s3_client(secure, max_attempts=1), "team-a", endpoint=secure.endpoint)
    assert "caConfigMapName" in str(_error(lambda: store.get("k"), StorageUnavailable))


def test_no_secret_shows_anywhere(settings: S3Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wrong = replace(settings, secret_access_key="s3cr3t-key", session_token="s3cr3t-token")
    assert "s3cr3t" not in repr(wrong)
    store, _ = open_store("s3://team-a", wrong)
    for call in _calls(store, tmp_path):
        with pytest.raises(StoreError) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert "s3cr3t" not in shown and "AWS4-HMAC" not in shown and settings.access_key_id is not None
        assert caught.value.__suppress_context__
    assert "s3cr3t" not in caplog.text


def test_half_a_key_pair_is_refused() -> None:
    with pytest.raises(StorageMisconfigured, match="AWS_SECRET_ACCESS_KEY go together"):
        S3Settings(access_key_id="a")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://Bad_Bucket/x", "not an S3 address"),
        ("s3:///x", "not an S3 address"),
        ("s3://team-a/x?versionId=3", "not an S3 address"),
        ("s3://team-a/../x", "'..'"),
        ("s3://team-a/a//b", "empty"),
        ("file://host/x", "three slashes"),
        ("https://example.test/x", "s3:// and file://"),
    ],
)
def test_a_wrong_address_is_refused_before_any_request(uri: str, told: str) -> None:
    with pytest.raises(StorageMisconfigured, match=told.replace(".", r"\.")) as caught:
        open_store(uri)
    assert caught.value.failure_class == "InvalidSpec"


def test_a_wrong_endpoint_is_refused_before_any_request() -> None:
    with pytest.raises(StorageMisconfigured, match=r"storage\.endpoint"):
        open_store("s3://team-a/x", S3Settings(endpoint="no scheme"))


def test_a_plain_path_is_a_local_store(tmp_path: Path) -> None:
    store, key = open_store(str(tmp_path / "with space" / "x"))
    store.put(key, b"1")
    assert (tmp_path / "with space" / "x").read_bytes() == b"1"
    again, key = open_store(store.uri(key))
    assert again.get(key) == b"1"


def test_a_local_store_leaves_no_file_of_its_own(tmp_path: Path) -> None:
    store, key = open_store(str(tmp_path / "x"))
    store.put_if_absent(key, b"1")
    store.put_if_absent(key, b"2")
    store.put(key, b"3")
    with pytest.raises(ObjectNotFound):
        store.put(key, tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_key_cannot_leave_a_local_store(tmp_path: Path) -> None:
    store, _ = open_store(str(tmp_path / "x"))
    for key in ("../out", "a/../../out", "/etc/hostname", ""):
        with pytest.raises(ValueError, match="not a valid key"):
            store.put(key, b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_its_own_failure(settings: S3Settings) -> None:
    error = errors.from_os_error(_os_error_of_a_full_disk(), "write", "/scratch/part")
    assert isinstance(error, DiskFull) and error.failure_class == "DiskFull" and "/scratch/part" in str(error)


def _os_error_of_a_full_disk() -> OSError:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    return caught.value


def test_every_error_has_its_row_in_the_failure_table() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StoreError)]
    assert len(kinds) == 12
    assert {kind.failure_class for kind in kinds} <= set(TABLE)


def test_the_store_loads_without_torch_or_boto3() -> None:
    code = (
        "import sys; import finetune_trainer.store.artifacts, finetune_trainer.store.claims;"
        "print(sorted({'torch', 'boto3', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "[]", shown.stderr


# Servers that misbehave: a client between the store and the real server


def _refusal(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def test_a_server_that_refuses_conditions_is_told(settings: S3Settings) -> None:
    class Old(Between):
        def put_object(self, **arguments: Any) -> Any:
            if "IfNoneMatch" in arguments:
                raise _refusal("NotImplemented", 501)
            return self.real.put_object(**arguments)

    store = S3Store(Old(s3_client(settings)), "team-a")
    error = _error(lambda: store.put_if_absent("old", b"x"), ConditionalWriteUnsupported)
    assert "If-None-Match" in str(error) and error.failure_class == "InvalidSpec"


def test_a_clock_that_is_off_is_told_as_a_fault_of_the_platform_and_not_of_the_keys(settings: S3Settings) -> None:
    """The server answers 403, as it does to wrong keys; another try, on another node, may help."""

    class Skewed(Between):
        def put_object(self, **arguments: Any) -> Any:
            raise _refusal("RequestTimeTooSkewed", 403)

    store = S3Store(Skewed(s3_client(settings)), "team-a")
    error = _error(lambda: store.put("late", b"x"), StorageUnavailable)
    assert "clocks of node and server differ" in str(error) and "platform team" in str(error)


def test_a_conflict_between_writers_is_tried_again(settings: S3Settings) -> None:
    class Busy(Between):
        left = 2

        def put_object(self, **arguments: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                raise _refusal("ConditionalRequestConflict", 409)
            return self.real.put_object(**arguments)

    waits: list[float] = []
    store = S3Store(Busy(s3_client(settings)), "team-a", sleep=waits.append)
    assert store.put_if_absent("busy", b"x") is True
    assert len(waits) == 2 and store.get("busy") == b"x"
    always = Busy(s3_client(settings))
    always.left = 99
    _error(lambda: S3Store(always, "team-a", sleep=waits.append).put_if_absent("busy-2", b"x"), StorageUnavailable)


class Breaking(Between):
    """Breaks each body after its first piece."""

    def get_object(self, **arguments: Any) -> Any:
        answer = self.real.get_object(**arguments)
        answer["Body"] = BreakingBody(answer["Body"])
        return answer


class BreakingBody(Between):
    pieces = 0

    def read(self, amount: int) -> bytes:
        self.pieces += 1
        if self.pieces > 1:
            raise ReadTimeoutError(endpoint_url="x")
        return bytes(self.real.read(amount))


def test_a_broken_download_is_picked_up_where_it_broke(settings: S3Settings) -> None:
    content = os.urandom(7 * (1 << 20) + 5)
    client = s3_client(settings)
    S3Store(client, "team-a").put("stream", content)
    store = S3Store(Breaking(client), "team-a", sleep=lambda _: None)
    assert store.get("stream") == content


def test_an_object_replaced_while_it_is_read_is_not_mixed(settings: S3Settings) -> None:
    client = s3_client(settings)
    plain = S3Store(client, "team-a")
    plain.put("replaced", b"a" * (3 << 20))
    pieces = S3Store(Breaking(client), "team-a", sleep=lambda _: None).stream("replaced")
    next(pieces)
    plain.put("replaced", b"b" * (3 << 20))
    assert "changed while it was read" in str(_error(lambda: list(pieces), StorageUnavailable))
