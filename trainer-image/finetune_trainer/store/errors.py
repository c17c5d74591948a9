"""Every error of the store. Each maps to one row of the failure table by `failure_class`.

FinetuneError (finetune_api)
└── StoreError
    ├── CredentialsRejected          the server knows the bucket but not, or not enough, the caller
    ├── BucketNotFound
    ├── ObjectNotFound
    ├── StorageUnavailable           no answer, or none that makes sense; another try may help
    ├── DiskFull                     the local side ran out of space
    ├── StorageMisconfigured         a URI, region or endpoint that cannot work
    │   └── ConditionalWriteUnsupported
    ├── OutputInUse                  another job owns the output
    ├── Superseded                   a newer attempt owns the output; this one has to end
    ├── NodeFilesMissing             another node has not uploaded its files of a checkpoint
    └── CheckpointInvalid            stored bytes are not what their manifest says

Messages say what happened, where and what to do. They hold error codes, addresses and key ids' names
at most: never a key, a token or a signature.
"""

from __future__ import annotations

import errno
from pathlib import Path

from finetune_api.failures import FinetuneError


class StoreError(FinetuneError):
    """Base of all errors of the store."""

    failure_class = "StorageUnavailable"


class CredentialsRejected(StoreError):
    """The storage refused the caller; `code` is its reason, for example `SignatureDoesNotMatch`."""

    failure_class = "CredentialsRejected"

    def __init__(self, message: str, *, code: str, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class BucketNotFound(StoreError):
    """The bucket does not exist at this endpoint."""

    failure_class = "BucketNotFound"


class ObjectNotFound(StoreError):
    """The bucket is there, the object is not."""

    failure_class = "ObjectNotFound"


class StorageUnavailable(StoreError):
    """The storage did not answer, or answered with a fault of its own, after all retries."""

    failure_class = "StorageUnavailable"


class DiskFull(StoreError):
    """A local file could not be written for lack of space."""

    failure_class = "DiskFull"


class StorageMisconfigured(StoreError):
    """The address or the settings cannot work, whatever the storage holds."""

    failure_class = "InvalidSpec"


class ConditionalWriteUnsupported(StorageMisconfigured):
    """The storage cannot create an object only if it is absent, which the protocol rests on."""


class OutputInUse(StoreError):
    """The output belongs to another job, or to a run that differs from this one."""

    failure_class = "OutputInUse"


class Superseded(StoreError):
    """A newer attempt has taken the output over: what this one writes no longer counts."""

    failure_class = "Stopped"


class NodeFilesMissing(StoreError):
    """Not every node uploaded its files of a checkpoint in time, so it was not committed."""

    failure_class = "CollectiveFailed"


class CheckpointInvalid(StoreError):
    """A stored checkpoint, or every one that could be resumed from, fails its check."""

    failure_class = "CheckpointInvalid"


def from_os_error(error: OSError, action: str, path: Path | str) -> StoreError:
    """The typed error for a failed operation on a local file; `action` reads like "write"."""
    what = f"cannot {action} {path}: {error.strerror or type(error).__name__}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ObjectNotFound(f"{what}. Check the path.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return CredentialsRejected(f"{what}. Grant this user access to the folder.", code="AccessDenied")
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFull(f"{what}. Free space, or use a larger disk.")
    return StorageUnavailable(f"{what}. Check the disk or mount.")
