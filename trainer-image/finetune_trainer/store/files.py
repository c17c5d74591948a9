"""Folders of files in the store: list with hashes, upload, and download with every byte checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune_trainer.store.documents import FileEntry, check_part_name
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, from_os_error
from finetune_trainer.store.objects import ObjectStore

AT_ONCE = 4
"""How many files are on their way at the same time; large ones go in several parts at once besides."""
SMALLEST_COPY = 1 << 20
"""Bytes of the smallest file that the storage is asked to copy: below, sending it takes one request as well."""


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


def upload(store: ObjectStore, key: str, file: LocalFile, source: str | None = None) -> None:
    """Put one file under key, or a copy of source where that has its content. Raises ValueError if the file changed.

    source: a key that had the same content once. It may be gone or altered now.
    """
    if source is None or not store.copy(source, key, file.entry.sha256):
        store.put(key, file.path)
    try:
        status = file.path.stat()
    except OSError as error:
        raise from_os_error(error, "read", file.path) from error
    if (status.st_size, status.st_mtime_ns) != (file.entry.size, file.modified):
        raise ValueError(f"{file.path} changed while it was uploaded: write it elsewhere, then rename it")


def upload_all(
    store: ObjectStore, files: Iterable[tuple[str, LocalFile]], sources: Mapping[str, str] | None = None
) -> None:
    """Put the files under their keys, several at once. The first error ends it: no further file is begun.

    sources: by SHA-256, the keys of what is stored already: files from SMALLEST_COPY bytes on are copied from there.
    """
    known = sources or {}
    _each(
        partial(upload, store, key, file, known.get(file.entry.sha256) if file.entry.size >= SMALLEST_COPY else None)
        for key, file in files
    )


def download(store: ObjectStore, entries: Iterable[tuple[str, FileEntry]], target: Path) -> None:
    """Fetch each entry from its key into target, which appears whole and checked, or not at all.

    Several come at once; the first error ends it. target must be absent or an empty folder. Raises
    CheckpointInvalid if a file is missing, cut or altered, and DiskFull, StorageUnavailable and the
    like, which say nothing about what is stored.
    """
    unchecked = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")

    def get(key: str, entry: FileEntry) -> None:
        path = unchecked / entry.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            store.download(key, path)
            found = _entry(unchecked, path)
        except ObjectNotFound:
            raise CheckpointInvalid(f"{store.uri(key)} is missing") from None
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        _check(found, entry, store.uri(key))

    try:
        _each(partial(get, key, entry) for key, entry in entries)
        unchecked.rename(target)
    except OSError as error:
        raise from_os_error(error, "write", target) from error
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)


def _each(actions: Iterable[Callable[[], None]]) -> None:
    """All actions, or none that begins after the first error; an error of those that had begun."""
    failed = threading.Event()

    def run(action: Callable[[], None]) -> None:
        if not failed.is_set():
            try:
                action()
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="transfer") as pool:
        futures = [pool.submit(run, action) for action in actions]
    for future in futures:
        future.result()


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
