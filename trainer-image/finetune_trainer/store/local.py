"""The object store on a local folder: same contract as S3, files as objects."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.store.errors import (
    ConditionalWriteUnsupported,
    ObjectNotFound,
    StoreError,
    from_os_error,
)
from finetune_trainer.store.objects import CHUNK_BYTES, ObjectInfo

_PARTIAL = ".partial"


class LocalStore:
    """Objects are files below root; folders come and go with the objects in them."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def uri(self, key: str) -> str:
        """`file:///…`, as the address of an object or of a prefix."""
        return self._path(key).as_uri() if key else self._root.as_uri()

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes or a file; durable on disk when this returns."""
        path = self._path(key)
        try:
            self._write_partial(path, data).replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise from_os_error(error, "write", path) from error

    def copy(self, source: str, key: str, sha256: str) -> bool:
        """False: a copy on the same disk costs what put costs, and a link would share its damage."""
        return False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store data if the key is free. A hard link makes the name appear once, with all its bytes."""
        path = self._path(key)
        try:
            partial = self._write_partial(path, data)
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        try:
            os.link(partial, path)
            _sync_folder(path.parent)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise ConditionalWriteUnsupported(
                f"cannot create {path} by a hard link: {error.strerror}. Use a file system with hard links, or s3://."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The file's bytes."""
        path = self._path(key)
        try:
            if limit is not None and path.stat().st_size > limit:
                raise StoreError(f"{path} is larger than the {limit} bytes that are allowed there.")
            return path.read_bytes()
        except OSError as error:
            raise self._read_error(error, path) from error

    def download(self, key: str, path: Path) -> None:
        """Copy the file to path."""
        source = self._path(key)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with source.open("rb"):
                pass
        except OSError as error:
            raise self._read_error(error, source) from error
        try:
            shutil.copyfile(source, partial)
            partial.replace(path)
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        finally:
            partial.unlink(missing_ok=True)

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The file's bytes from start."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise self._read_error(error, path) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All files whose relative path begins with prefix."""
        folder = self._root.joinpath(*prefix.split("/")[:-1])
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_missing):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not _is_partial(name):
                    try:
                        yield self._info(key, path)
                    except FileNotFoundError:
                        continue  # removed by another process since the folder was read

    def head(self, key: str) -> ObjectInfo:
        """Size and modification time of the file."""
        path = self._path(key)
        try:
            if path.is_dir():
                raise ObjectNotFound(f"{path} is a folder, not a file. Check the path.")
            return self._info(key, path)
        except OSError as error:
            raise self._read_error(error, path) from error

    def delete(self, key: str) -> None:
        """Remove the file, and the folders that this leaves empty."""
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise from_os_error(error, "delete", path) from error
        for folder in path.parents:
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or _is_partial(parts[-1]):
            raise ValueError(f"{key!r} is not a valid key")
        return self._root.joinpath(*parts)

    def _write_partial(self, path: Path, data: bytes | Path) -> Path:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with self._create(partial) as target:
                if isinstance(data, bytes):
                    target.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, target, CHUNK_BYTES)
                target.flush()
                os.fsync(target.fileno())
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return partial

    @staticmethod
    def _create(partial: Path) -> BinaryIO:
        while True:
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                return partial.open("xb")
            except FileNotFoundError:
                continue  # a delete in another process removed the folder while it was empty

    @staticmethod
    def _info(key: str, path: Path) -> ObjectInfo:
        status = path.stat()
        return ObjectInfo(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")

    @staticmethod
    def _read_error(error: OSError, path: Path) -> StoreError:
        if isinstance(error, IsADirectoryError):
            return ObjectNotFound(f"{path} is a folder, not a file. Check the path.")
        return from_os_error(error, "read", path)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise from_os_error(error, "list", error.filename)
