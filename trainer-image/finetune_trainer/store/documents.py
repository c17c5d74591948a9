"""The JSON documents of the store. All are parsed strictly, and bounded in size before they are parsed.

Times are UTC; sizes are bytes; SHA-256 is lower-case hex over the content itself (the checksum that
S3 gives a multipart upload is composite and cannot stand for it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel

from finetune_api.guards import GuardState
from finetune_trainer.store.errors import CheckpointInvalid, StoreError
from finetune_trainer.store.layout import path_of
from finetune_trainer.store.objects import ObjectStore

MAX_DOCUMENT_BYTES = 4 << 20
MAX_CHAIN = 64
MAX_REASON = 2048
_PART_NAME = re.compile(r"[A-Za-z0-9_.+=@-]+(/[A-Za-z0-9_.+=@-]+)*")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=512)]
Count = Annotated[int, Field(ge=0)]


def check_part_name(name: str) -> str:
    """The name if it is a plain relative path of plain characters without `..`, else ValueError."""
    if len(name) > 512 or not _PART_NAME.fullmatch(name) or any(p in (".", "..") for p in name.split("/")):
        raise ValueError(
            f"{name[:80]!r} is not a valid file name: use relative paths of letters, digits and _.+=@- only"
        )
    return name


class StoredDocument(BaseModel):
    """A frozen document with camelCase names; unknown fields and loose types are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        ser_json_inf_nan="null",
    )

    def to_bytes(self) -> bytes:
        """The JSON that is stored."""
        return self.model_dump_json(by_alias=True).encode()

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self:
        """The document under key. Raises CheckpointInvalid, naming what is wrong, or ObjectNotFound."""
        return cls.parse(read_bounded(store, key), store.uri(key))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Parse stored bytes; raises CheckpointInvalid."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            path = ".".join(str(part) for part in first["loc"]) or "document"
            raise CheckpointInvalid(
                f"{where} is not a valid {cls.__name__}: {path}: {first['msg']}. Do not edit files below output.uri."
            ) from None


def read_bounded(store: ObjectStore, key: str) -> bytes:
    """A document's bytes; raises CheckpointInvalid if it is too large to be one, or ObjectNotFound."""
    try:
        return store.get(key, limit=MAX_DOCUMENT_BYTES)
    except StoreError as error:
        if type(error) is StoreError:
            raise CheckpointInvalid(str(error)) from None
        raise


def utc_now() -> datetime:
    """The current time, whole seconds, UTC."""
    return datetime.now(UTC).replace(microsecond=0)


class FileEntry(StoredDocument):
    """One stored file: its path below the folder, its size and SHA-256."""

    name: Annotated[str, AfterValidator(check_part_name)]
    size: Count
    sha256: Sha256


Files = Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=20_000)]


class Place(StoredDocument):
    """A fence and a step, and so the folder that an upload went to."""

    fence: Annotated[int, Field(ge=1)]
    step: Count


class Part(FileEntry):
    """One file of a checkpoint. node: which node uploaded it."""

    node: Count = 0

    @property
    def path(self) -> str:
        """The key below the checkpoint."""
        return path_of(self.node, self.name)


Parts = Annotated[tuple[Part, ...], Field(min_length=1, max_length=20_000)]


class Claim(StoredDocument):
    """Which job owns the output, and what it trains: digests of the resolved model, data and method."""

    version: Literal[1] = 1
    job_uid: Text
    namespace: Text
    name: Text
    model_digest: Text
    data_digest: Text
    method_digest: Text
    created_time: AwareDatetime = Field(default_factory=utc_now)


class CheckpointRef(StoredDocument):
    """Names one committed checkpoint for good: its manifest cannot change without notice."""

    fence: Annotated[int, Field(ge=1)]
    step: Count
    manifest_sha256: Sha256


class Skipped(StoredDocument):
    """A stored checkpoint that could not be resumed from, and why."""

    fence: Count
    step: Count
    reason: Annotated[str, Field(max_length=MAX_REASON)]


class Taken(StoredDocument):
    """Somebody starts under this fence: whoever holds a lower one is cut off. The Fence record follows.

    token: random, so that the writer knows its own document again.
    """

    version: Literal[1] = 1
    job_uid: Text
    attempt: Count
    token: Text
    created_time: AwareDatetime = Field(default_factory=utc_now)


class Fence(StoredDocument):
    """The start of one attempt. Whoever holds the highest fence owns the output.

    chain: the checkpoints of earlier fences that count from here on, newest first, steps falling; the
    first is the one this attempt resumes from, and an empty chain is a start from the base model.
    guards: what the guards have changed up to this start; the next fence takes it over.
    token: that of the fence's Taken document.
    """

    version: Literal[1] = 1
    fence: Annotated[int, Field(ge=1)]
    job_uid: Text
    attempt: Count
    token: Text
    created_time: AwareDatetime = Field(default_factory=utc_now)
    chain: Annotated[tuple[CheckpointRef, ...], Field(max_length=MAX_CHAIN)] = ()
    skipped: Annotated[tuple[Skipped, ...], Field(max_length=MAX_CHAIN)] = ()
    guards: GuardState = GuardState()

    @property
    def base(self) -> CheckpointRef | None:
        """The checkpoint that this attempt resumes from."""
        return self.chain[0] if self.chain else None


class Manifest(StoredDocument):
    """The contents of one checkpoint. It is written last: without it the checkpoint does not exist.

    metrics: numbers to choose the best checkpoint by; null stands for a value that is not finite.
    meta: the trainer's own, for example what the data position rests on.
    """

    version: Literal[1] = 1
    job_uid: Text
    attempt: Count
    fence: Annotated[int, Field(ge=1)]
    step: Count
    created_time: AwareDatetime = Field(default_factory=utc_now)
    world_size: Annotated[int, Field(ge=1)]
    parts: Parts
    metrics: Annotated[dict[Text, float | None], Field(max_length=256)] = {}
    meta: Annotated[dict[Text, JsonValue], Field(max_length=256)] = {}

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        _check_unique(self.parts)
        return self


class NodeFiles(StoredDocument):
    """What a node other than 0 has uploaded for one checkpoint; written after the files.

    missing: why it does not bring its part; empty where it does.
    """

    version: Literal[1] = 1
    files: Annotated[tuple[FileEntry, ...], Field(max_length=20_000)] = ()
    missing: Annotated[str, Field(max_length=MAX_REASON)] = ""

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Self:
        if bool(self.files) == bool(self.missing):
            raise ValueError("either files, or why there are none")
        _check_unique(self.files)
        return self


class Removal(StoredDocument):
    """The places that a prune is about to empty: from here on no checkpoint there counts."""

    version: Literal[1] = 1
    places: tuple[Place, ...]


class Artifact(StoredDocument):
    """The published files of a finished run; written last, so it vouches for all of them."""

    version: Literal[1] = 1
    job_uid: Text
    attempt: Count
    fence: Annotated[int, Field(ge=1)]
    created_time: AwareDatetime = Field(default_factory=utc_now)
    files: Files

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        _check_unique(self.files)
        return self


def _check_unique(files: Sequence[FileEntry]) -> None:
    if len({file.name for file in files}) != len(files):
        raise ValueError("a file is listed twice")
