"""The places: an S3 prefix, a folder (pvc:// and file://), and which class serves a URI."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference
from finetune_api.uri import Uri, parse_uri
from finetune_trainer.sources.access import resolve_access
from finetune_trainer.sources.place import Place, Purpose, Reach, SourceFile, checked_name
from finetune_trainer.store.errors import StoreError, from_os_error
from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.objects import CHUNK_BYTES, ObjectStore, S3Settings

IMPATIENT_TRIES = 2
IMPATIENT_READ_SECONDS = 8.0
FULL_FINGERPRINT_BYTES = 64 << 20
_EDGE_BYTES = 1 << 20
T = TypeVar("T")


def open_source(reference: Reference, *, purpose: Purpose, field: str, reach: Reach) -> Place:
    """The place that reference names; nothing is contacted yet.

    field: the spec path of the URI without `spec.`, for example `dataset.sources[0].uri`. Raises
    FinetuneError(InvalidSpec), also for file:// where reach does not allow it.
    """
    uri = parse_uri(reference.uri, field=field)
    match uri.scheme:
        case "s3":
            store = s3_store(uri, resolve_access(reference.access, reach.env), field, reach)
            return S3Place(uri, store, purpose, field, reach)
        case "hf":
            from finetune_trainer.sources.hub import HubPlace  # huggingface_hub takes half a second to import

            return HubPlace(uri, reference, purpose, field, reach)
        case "pvc":
            root = reach.claims / uri.container
            return FolderPlace(uri, root / uri.path, root, purpose, field, reach)
        case "file":
            refuse_file(uri, field, reach)
            return FolderPlace(uri, local_path(uri), None, purpose, field, reach)


def open_output(reference: Reference, *, field: str, reach: Reach) -> tuple[ObjectStore, str]:
    """The store that an output URI names, and the key prefix of the output in it; nothing is contacted yet.

    Raises FinetuneError: InvalidSpec, BucketNotFound for a claim that is not mounted.
    """
    uri = parse_uri(reference.uri, field=field)
    refuse_file(uri, field, reach)
    match uri.scheme:
        case "s3":
            return s3_store(uri, resolve_access(reference.access, reach.env), field, reach), uri.path.rstrip("/")
        case "pvc":
            root = reach.claims / uri.container
            if not root.is_dir():
                raise FinetuneError(
                    f"{field} is {uri}, but the claim {uri.container!r} is not mounted. Check the claim's name.",
                    failure_class="BucketNotFound",
                    field=f"spec.{field}",
                )
            return LocalStore(root), uri.path.rstrip("/")
        case "file":
            path = local_path(uri)
            return LocalStore(path.parent), path.name
    raise FinetuneError(
        f"{field} is {uri}; outputs are s3:// or pvc://.", failure_class="InvalidSpec", field=f"spec.{field}"
    )


def local_path(uri: Uri) -> Path:
    """The path that a file:// URI names; `%20` in it is a blank."""
    return Path(unquote(uri.path))


def refuse_file(uri: Uri, field: str, reach: Reach) -> None:
    """Raises FinetuneError(InvalidSpec) for a file:// URI unless reach allows it."""
    if uri.scheme == "file" and not reach.allow_file:
        raise FinetuneError(
            f"{field} is {uri}; file:// works only with `finetune run` on your own machine. "
            "Upload the files and use s3://, pvc:// or hf://.",
            failure_class="InvalidSpec",
            field=f"spec.{field}",
        )


def s3_store(uri: Uri, settings: S3Settings, field: str, reach: Reach) -> ObjectStore:
    """The store of an s3:// URI's bucket with the timeouts that reach asks for. Raises FinetuneError."""
    from finetune_trainer.store.s3 import S3Store, s3_client  # boto3 is slow to import

    try:
        if reach.patient:
            client = s3_client(settings)
        else:
            client = s3_client(settings, max_attempts=IMPATIENT_TRIES, read_timeout=IMPATIENT_READ_SECONDS)
    except StoreError as error:
        raise with_field(error, field) from None
    return S3Store(client, uri.container, endpoint=settings.endpoint)


def with_field(error: StoreError, field: str) -> StoreError:
    """The same error with the spec path to change: keys, storage settings, or the URI itself."""
    if error.field is None:
        match error.failure_class:
            case "CredentialsRejected":
                error.field = "spec.credentials"
            case "StorageUnavailable" | "InvalidSpec":
                error.field = "spec.storage"
            case _:
                error.field = f"spec.{field}"
    return error


class S3Place:
    """The objects below an s3:// URI, or the one object that it names."""

    revision = None

    def __init__(self, uri: Uri, store: ObjectStore, purpose: Purpose, field: str, reach: Reach) -> None:
        self._uri = uri
        self._store = store
        self._purpose = purpose
        self._field = field
        self._reach = reach

    @property
    def uri(self) -> str:
        """s3://bucket/path."""
        return str(self._uri)

    def files(self) -> tuple[SourceFile, ...]:
        """See Place.files."""
        return tuple(sorted(self._keys))

    def read_start(self, name: str, size: int) -> bytes:
        """See Place.read_start."""
        data = bytearray()
        for chunk in self.stream(name):
            data += chunk
            if len(data) >= size:
                break
        return bytes(data[:size])

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place.stream."""
        try:
            for chunk in self._store.stream(self._key(name)):
                self._reach.beat()
                yield chunk
        except StoreError as error:
            raise self._typed(error) from None

    def bring(self, name: str, path: Path) -> None:
        """See Place.bring."""
        try:
            self._store.download(self._key(name), path)
        except StoreError as error:
            raise self._typed(error) from None
        self._reach.beat()

    def _key(self, name: str) -> str:
        return self._keys[next(file for file in self._keys if file.name == name)]

    @cached_property
    def _keys(self) -> dict[SourceFile, str]:
        key = self._uri.path.rstrip("/")
        try:
            found = self._single(key) if key else {}
            if not found:
                folder = f"{key}/" if key else ""
                for item in self._store.list(folder):
                    self._reach.beat()
                    name = checked_name(item.key.removeprefix(folder), self.uri, self._field)
                    found[SourceFile(name, item.size, item.etag)] = item.key
        except StoreError as error:
            raise self._typed(error) from None
        if not found:
            raise not_found(self.uri, self._purpose, self._field, "the bucket has no such object and nothing below it")
        return found

    def _single(self, key: str) -> dict[SourceFile, str]:
        try:
            item = self._store.head(key)
        except StoreError as error:
            if error.failure_class != "ObjectNotFound":
                raise
            return {}
        return {SourceFile(key.rsplit("/", 1)[-1], item.size, item.etag): key}

    def _typed(self, error: StoreError) -> FinetuneError:
        if error.failure_class == "ObjectNotFound":
            error.failure_class = self._purpose.not_found
        return with_field(error, self._field)


class FolderPlace:
    """The files below a folder of this machine, or one file. Linked, not copied.

    root: links may not lead out of it; None allows any.
    """

    revision = None

    def __init__(self, uri: Uri, path: Path, root: Path | None, purpose: Purpose, field: str, reach: Reach) -> None:
        self._uri = uri
        self._path = path
        self._root = root
        self._purpose = purpose
        self._field = field
        self._reach = reach

    @property
    def uri(self) -> str:
        """pvc://claim/path or file:///path."""
        return str(self._uri)

    def files(self) -> tuple[SourceFile, ...]:
        """See Place.files."""
        return self._listed

    def read_start(self, name: str, size: int) -> bytes:
        """See Place.read_start."""
        return self._guard(lambda: _read(self._file(name), size))

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place.stream."""
        try:
            with self._file(name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self._reach.beat()
                    yield chunk
        except OSError as error:
            raise self._typed(error) from None

    def bring(self, name: str, path: Path) -> None:
        """See Place.bring."""
        self._guard(lambda: path.symlink_to(self._file(name).resolve()))

    @cached_property
    def _listed(self) -> tuple[SourceFile, ...]:
        if self._root is not None and not self._root.is_dir():
            raise not_found(self.uri, self._purpose, self._field, f"the claim {self._uri.container!r} is not mounted")
        if self._path.is_file():
            names = [self._path.name]
        else:
            names = sorted(self._guard(lambda: list(self._walk())))
        if not names:
            raise not_found(self.uri, self._purpose, self._field, "there is no such file or folder, or it is empty")
        return self._guard(lambda: tuple(self._describe(name) for name in names))

    def _walk(self) -> Iterator[str]:
        for parent, folders, names in os.walk(self._path):
            # Hidden folders hold caches and version control, `..data` of mounted volumes among them.
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for name in names:
                path = Path(parent, name)
                if not name.startswith(".") and path.is_file():
                    yield path.relative_to(self._path).as_posix()

    def _describe(self, name: str) -> SourceFile:
        self._reach.beat()
        path = self._file(checked_name(name, self.uri, self._field))
        return SourceFile(name, path.stat().st_size, fingerprint(path))

    def _file(self, name: str) -> Path:
        path = self._path if self._path.is_file() else self._path / name
        if self._root is not None and not path.resolve().is_relative_to(self._root.resolve()):
            raise FinetuneError(
                f"{self.uri}: {name} is a link that leads out of the claim. Copy the file into the claim.",
                failure_class="InvalidSpec",
                field=f"spec.{self._field}",
            )
        return path

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise self._typed(error) from None

    def _typed(self, error: OSError) -> FinetuneError:
        typed = from_os_error(error, "read", self.uri)
        if typed.failure_class == "ObjectNotFound":
            typed.failure_class = self._purpose.not_found
        return with_field(typed, self._field)


def fingerprint(path: Path) -> str:
    """A hash that stays the same for a copy of the file.

    SHA-256 of the content up to 64 MiB; above that of the size and the first and last MiB, since reading a model's
    weights only to name them would take minutes.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= FULL_FINGERPRINT_BYTES:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            return digest.hexdigest()
        digest.update(f"{size}:".encode())
        digest.update(file.read(_EDGE_BYTES))
        file.seek(-_EDGE_BYTES, os.SEEK_END)
        digest.update(file.read(_EDGE_BYTES))
    return f"edges-{digest.hexdigest()}"


def not_found(uri: str, purpose: Purpose, field: str, why: str) -> FinetuneError:
    """The error for a place without a file; field without `spec.`."""
    return FinetuneError(
        f"{purpose.word} at {uri} was not found: {why}. Check {field}, or upload the files there.",
        failure_class=purpose.not_found,
        field=f"spec.{field}",
    )


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
