"""The small surface of an object store that everything above it uses, and how to open one.

A key is a relative path with `/` between its parts. All methods raise `StoreError` and nothing else
for what the storage does; a wrong argument is a ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from finetune_trainer.store.errors import StorageMisconfigured, StoreError

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `size` is in bytes; `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class ObjectStore(Protocol):
    """Whole objects under string keys. A reader sees an old or a new object, never a mixture."""

    def uri(self, key: str) -> str:
        """The address of a key for people and documents."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a local file of any size, replacing what was there."""

    def copy(self, source: str, key: str, sha256: str) -> bool:
        """Store under key what source holds without sending it; True if that is surely the content of sha256 (hex).

        After False, for whatever reason, key may be free or hold anything: put it.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store data only if the key is free; True if this call stored it.

        Of any number of callers one gets True. False is also possible for the caller that won, when
        the answer to its first try was lost on the way: put something of your own into the data and
        read it back. Raises ConditionalWriteUnsupported.
        """

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The whole object. Raises ObjectNotFound, and StoreError if it is larger than limit bytes."""

    def download(self, key: str, path: Path) -> None:
        """Write the object to a local file that appears whole or not at all; its folder must exist."""

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from offset start, in pieces; broken connections are picked up again."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with prefix, in no promised order. A missing folder is empty."""

    def head(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectNotFound."""

    def delete(self, key: str) -> None:
        """Remove the object; not an error if it is absent."""


@dataclass(frozen=True)
class S3Settings:
    """How to reach an S3 server. Secrets never show in repr, errors or logs.

    endpoint: URL; None is AWS. path_style: None is path style for an endpoint of one's own and the
    bucket's host name on AWS. ca_file: PEM bundle that the endpoint's certificate is checked against.
    access_key_id None: the SDK's own chain (a service account's web identity, a profile).
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    ca_file: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise StorageMisconfigured(
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together, but only one of them is set. "
                "Set both in the secret that credentials.secretName names."
            )


def join_key(*parts: str) -> str:
    """The parts joined by one `/` each; empty parts are left out."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def open_store(uri: str, settings: S3Settings | None = None) -> tuple[ObjectStore, str]:
    """The store that holds uri, and uri's key in it: the prefix of a folder or the key of a file.

    `s3://bucket/prefix`, `file:///path`, or a plain local path. Nothing is contacted yet.
    Raises StorageMisconfigured.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        from finetune_trainer.store.s3 import S3Store, s3_client  # boto3 is slow to import

        if not _BUCKET_NAME.fullmatch(parts.netloc) or parts.query or parts.fragment:
            raise StorageMisconfigured(f"{uri!r} is not an S3 address. Write s3://bucket/prefix.")
        key = _checked_key(parts.path.strip("/"), uri)
        settings = settings or S3Settings()
        return S3Store(s3_client(settings), parts.netloc, endpoint=settings.endpoint), key
    if parts.scheme == "file" and parts.netloc:
        raise StorageMisconfigured(f"{uri!r} names a host. Write file:///path, with three slashes.")
    if parts.scheme not in ("", "file"):
        raise StorageMisconfigured(f"{uri!r}: the store reads s3:// and file:// addresses.")
    from finetune_trainer.store.local import LocalStore

    path = Path(unquote(parts.path) if parts.scheme else uri).absolute()
    return LocalStore(path.parent), _checked_key(path.name, uri)


def _checked_key(key: str, uri: str) -> str:
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise StorageMisconfigured(f"{uri!r} holds an empty, '.' or '..' part. Write the address without it.")
    return key


def read_lines(store: ObjectStore, key: str, limit: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of a large text object without their newline, at constant memory.

    Raises StoreError of class DataInvalid, naming the line, if one is longer than limit bytes.
    """
    pending = bytearray()
    number = 1
    for chunk in store.stream(key):
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            pending += chunk[start:end]
            _check_line(len(pending), limit, store.uri(key), number)
            yield bytes(pending)
            pending.clear()
            number += 1
            start = end + 1
        pending += chunk[start:]
        _check_line(len(pending), limit, store.uri(key), number)
    if pending:
        yield bytes(pending)


def _check_line(size: int, limit: int, uri: str, number: int) -> None:
    if size > limit:
        raise StoreError(
            f"{uri} line {number} is longer than {limit} bytes. Check that the file has one record per line.",
            failure_class="DataInvalid",
        )
