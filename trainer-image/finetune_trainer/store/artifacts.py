"""The published result of a run, directly below the output's prefix.

The files first, `ARTIFACT.json` with their sizes and SHA-256 last: without it nothing is published.
"""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.store import files
from finetune_trainer.store.documents import Artifact
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound
from finetune_trainer.store.objects import ObjectStore, join_key
from finetune_trainer.store.writer import CheckpointWriter

ARTIFACT = "ARTIFACT.json"
_RESERVED = {"checkpoints", "fences", "removals", ARTIFACT}


def publish(writer: CheckpointWriter, folder: Path) -> Artifact:
    """Upload folder's files as the run's result; once this returns, read_artifact finds it.

    Publishing again replaces the earlier result, which is gone meanwhile. Raises Superseded if a later
    attempt has taken over, storage errors, and ValueError for a name that is the store's own.
    """
    store, prefix = writer.store, writer.prefix
    found = files.scan(folder)
    for file in found:
        top = file.entry.name.partition("/")[0]
        if top in _RESERVED or top.startswith("CLAIM"):
            raise ValueError(f"{file.path}: {top} is a name of the store's own. Rename the file.")
    writer.ensure_current()
    key = join_key(prefix, ARTIFACT)
    store.delete(key)
    for file in found:
        # Published files are replaced in place: one after the other, so that an attempt that was overtaken stops.
        writer.ensure_current()
        files.upload(store, join_key(prefix, file.entry.name), file)
    artifact = Artifact(
        job_uid=writer.fence.job_uid,
        attempt=writer.fence.attempt,
        fence=writer.fence.fence,
        files=tuple(file.entry for file in found),
    )
    writer.ensure_current()
    store.put(key, artifact.to_bytes())
    return artifact


def read_artifact(store: ObjectStore, prefix: str) -> Artifact | None:
    """What is published under prefix; None if nothing is.

    Raises CheckpointInvalid if the list is damaged or a listed file is missing or has another length.
    """
    try:
        artifact = Artifact.read(store, join_key(prefix, ARTIFACT))
    except ObjectNotFound:
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
