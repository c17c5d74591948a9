"""The published result of a run, directly below the output's prefix.

The files first, `ARTIFACT.json` with their sizes and SHA-256 last: without it nothing is published. It is created if
absent, so what an older attempt sends too late never takes the place of a newer one's list. The files have fixed names:
one that an older attempt had on its way when it was cut off can still replace a newer one's, and then has another hash.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune_trainer.store import files
from finetune_trainer.store.documents import Artifact
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, StorageUnavailable
from finetune_trainer.store.objects import ObjectStore, join_key
from finetune_trainer.store.writer import CheckpointWriter

ARTIFACT = "ARTIFACT.json"
_RESERVED = {"checkpoints", "fences", "removals", ARTIFACT}


def publish(writer: CheckpointWriter, folder: Path) -> Artifact:
    """Upload folder's files as the run's result; once this returns, read_artifact finds it.

    An earlier start's result is gone meanwhile. After an error, the same call may be made again; a list that had got
    through is then found, and stays as it is. Raises Superseded if a later attempt has taken over, storage errors,
    and ValueError for a name that is the store's own.
    """
    store, prefix = writer.store, writer.prefix
    found = files.scan(folder)
    for file in found:
        top = file.entry.name.partition("/")[0]
        if top in _RESERVED or top.startswith("CLAIM"):
            raise ValueError(f"{file.path}: {top} is a name of the store's own. Rename the file.")
    artifact = Artifact(
        job_uid=writer.fence.job_uid,
        attempt=writer.fence.attempt,
        fence=writer.fence.fence,
        files=tuple(file.entry for file in found),
    )
    key = join_key(prefix, ARTIFACT)
    writer.ensure_current()
    try:
        before = _listed(store, key)
    except CheckpointInvalid:
        before = None
        store.delete(key)  # a damaged list publishes nothing
    if before is not None:
        if _is_same(before, artifact):
            return before
        store.delete(key)
    _upload(writer, found)
    writer.ensure_current()
    store.put_if_absent(key, artifact.to_bytes())
    after = _listed(store, key)
    if after is None or not _is_same(after, artifact):
        raise _disturbed(writer, key)
    return after


def _upload(writer: CheckpointWriter, found: Iterable[files.LocalFile]) -> None:
    """The files are at their keys, as they were put there."""
    put = []
    for file in found:
        # Published files are replaced in place: one after the other, so that an attempt that was overtaken stops.
        writer.ensure_current()
        key = join_key(writer.prefix, file.entry.name)
        files.upload(writer.store, key, file)
        put.append(writer.store.head(key))
    for info in put:
        # What an older attempt had on its way when it was cut off may have arrived since.
        if writer.store.head(info.key) != info:
            raise _disturbed(writer, info.key)


def _disturbed(writer: CheckpointWriter, key: str) -> StorageUnavailable:
    """What to raise: to publish once more puts it right. Raises Superseded if that is no longer this attempt's."""
    writer.ensure_current()
    return StorageUnavailable(f"{writer.store.uri(key)} was changed by an attempt that was cut off. Publish again.")


def _listed(store: ObjectStore, key: str) -> Artifact | None:
    try:
        return Artifact.read(store, key)
    except ObjectNotFound:
        return None


def _is_same(listed: Artifact, mine: Artifact) -> bool:
    """Whether it is of the same start, which no other has, and lists the same files."""
    return (listed.fence, listed.files) == (mine.fence, mine.files)


def read_artifact(store: ObjectStore, prefix: str) -> Artifact | None:
    """What is published under prefix; None if nothing is.

    Raises CheckpointInvalid if the list is damaged or a listed file is missing or has another length.
    """
    artifact = _listed(store, join_key(prefix, ARTIFACT))
    if artifact is None:
        return None
    for file in artifact.files:
        key = join_key(prefix, file.name)
        try:
            size = store.head(key).size
        except ObjectNotFound:
            raise CheckpointInvalid(f"{store.uri(key)} was published, but is missing. Upload it again.") from None
        if size != file.size:
            raise CheckpointInvalid(f"{store.uri(key)} has {size} bytes, but {file.size} were published.")
    return artifact
