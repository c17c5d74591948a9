"""Bring what a run needs into a folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference
from finetune_trainer.sources.place import Place, Purpose, Reach, SourceFile, data_digest, model_digest
from finetune_trainer.sources.places import FolderPlace, open_source
from finetune_trainer.sources.select import adapter_files, config_files, data_files, model_files
from finetune_trainer.store.errors import from_os_error


@dataclass(frozen=True)
class Fetched:
    """What was brought. uri: as the reference has it. Names in files are relative to the destination.

    revision: the commit of an hf:// repository. digest: of this source alone; for a model or an adapter it is the one
    that preflight gave if nothing has changed since.
    """

    uri: str
    files: tuple[SourceFile, ...]
    revision: str | None
    digest: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def fetch(reference: Reference, destination: Path, *, purpose: Purpose, field: str, reach: Reach) -> Fetched:
    """Bring the files of a model, an adapter or a data source into destination, which is created and must be empty.

    field: the spec path of the URI without `spec.`. pvc:// and file:// files are linked, not copied. Raises
    FinetuneError with the field: ModelNotFound, DataNotFound, ModelUnsupported, DataInvalid, UnsafeFile,
    CredentialsRejected, BucketNotFound, StorageUnavailable, DiskFull or InvalidSpec.
    """
    place = open_source(reference, purpose=purpose, field=field, reach=reach)
    files = choose(place, reference, purpose, field)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        if not isinstance(place, FolderPlace):
            _check_room(destination, sum(file.size for file in files), place.uri)
        for file in files:
            path = destination / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            place.bring(file.name, path)
    except OSError as error:
        raise from_os_error(error, "write", destination) from error
    digest = data_digest([(reference.uri, files)]) if purpose is Purpose.DATA else model_digest(files)
    return Fetched(reference.uri, files, place.revision, digest)


def choose(place: Place, reference: Reference, purpose: Purpose, field: str) -> tuple[SourceFile, ...]:
    """The files of place that count for purpose; raises FinetuneError as the functions of select do."""
    match purpose:
        case Purpose.MODEL:
            return model_files(place, field=field)
        case Purpose.CONFIG:
            return config_files(place, field=field)
        case Purpose.ADAPTER:
            return adapter_files(place, field=field)
        case Purpose.DATA:
            return data_files(place, reference, field=field)


def _check_room(folder: Path, needed: int, uri: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FinetuneError(
            f"{uri} has {needed / 2**30:.1f} GiB, but the scratch disk has only {free / 2**30:.1f} GiB free. "
            "Ask the platform team for more ephemeralStorageGiB per GPU in the pool.",
            failure_class="DiskFull",
        )
