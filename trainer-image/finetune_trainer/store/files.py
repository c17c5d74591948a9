"""Folders of files in the store: list with hashes, upload, and download with every byte checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.store.documents import FileEntry, check_part_name
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, from_os_error
from finetune_trainer.store.objects import ObjectStore, join_key


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file as it was when it was hashed; `modified` is its time stamp in nanoseconds."""

    path: Path
    entry: FileEntry
    modified: int


def scan(folder: Path) -> tuple[LocalFile, ...]:
    """All files below folder with size and SHA-256, by name.

    Raises ValueError for a link, a special file, a name that is not plain, or an empty folder.
    """
    files = []
    try:
        for parent, folders, names in os.walk(folder, onerror=_reraise):
            for path in (Path(parent, name) for name in folders + names):
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise ValueError(f"{path} is a link or a special file: only plain files are stored")
            for path in (Path(parent, name) for name in names):
                modified = path.stat().st_mtime_ns
                files.append(LocalFile(path, _entry(folder, path), modified))
    except OSError as error:
        raise from_os_error(error, "read", folder) from error
    if not files:
        raise ValueError(f"{folder} holds no files")
    return tuple(sorted(files, key=lambda file: file.entry.name))


def upload(
    store: ObjectStore,
    prefix: str,
    files: Iterable[LocalFile],
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Put the files under prefix. Raises ValueError if one of them changed since it was hashed."""
    for file in files:
        before_each()
        store.put(join_key(prefix, file.entry.name), file.path)
        try:
            status = file.path.stat()
        except OSError as error:
            raise from_os_error(error, "read", file.path) from error
        if (status.st_size, status.st_mtime_ns) != (file.entry.size, file.modified):
            raise ValueError(f"{file.path} changed while it was uploaded: write it elsewhere, then rename it")


def download(store: ObjectStore, prefix: str, entries: Iterable[FileEntry], target: Path) -> None:
    """Fetch the entries into target, which appears whole and checked, or not at all.

    target must be absent or an empty folder. Raises CheckpointInvalid if a file is missing, cut or
    altered, and DiskFull, StorageUnavailable and the like, which say nothing about what is stored.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        for entry in entries:
            path = partial / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            key = join_key(prefix, entry.name)
            try:
                store.download(key, path)
            except ObjectNotFound:
                raise CheckpointInvalid(f"{store.uri(key)} is missing") from None
            _check(_entry(partial, path), entry, store.uri(key))
        partial.rename(target)
    except OSError as error:
        raise from_os_error(error, "write", target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(found: FileEntry, expected: FileEntry, uri: str) -> None:
    if found.size != expected.size:
        raise CheckpointInvalid(f"{uri} has {found.size} bytes, but {expected.size} were written")
    if found.sha256 != expected.sha256:
        raise CheckpointInvalid(f"{uri} was altered: its SHA-256 is not the one that was written")


def _entry(folder: Path, path: Path) -> FileEntry:
    name = check_part_name(path.relative_to(folder).as_posix())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name=name, size=file.tell(), sha256=digest)


def _reraise(error: OSError) -> None:
    raise error
