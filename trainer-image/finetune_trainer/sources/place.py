"""What a place of files offers, and the values that describe its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Protocol

from finetune_api import naming
from finetune_api.digest import digest
from finetune_api.failures import FinetuneError


class Purpose(StrEnum):
    """What a reference is for: decides which files count and what a missing one is called."""

    MODEL = "Model"
    CONFIG = "Config"
    """A model's config and tokenizer, without weights."""
    ADAPTER = "Adapter"
    DATA = "Data"

    @property
    def not_found(self) -> str:
        """The failure class of a missing file."""
        return "DataNotFound" if self is Purpose.DATA else "ModelNotFound"

    @property
    def word(self) -> str:
        """What it is called in messages, at the begin of a sentence."""
        return {Purpose.DATA: "The data", Purpose.ADAPTER: "The adapter"}.get(self, "The model")


@dataclass(frozen=True, slots=True, order=True)
class SourceFile:
    """One file of a place. name: relative, with `/`; size: bytes; etag: changes when the content does."""

    name: str
    size: int
    etag: str


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Reach:
    """How this process reaches places.

    env: holds credentials profiles, AWS_* and HF_ENDPOINT. claims: folder with one sub-folder per mounted claim.
    allow_file: whether file:// may be read (`finetune run` only). patient: False means short timeouts and two tries.
    beat: called whenever bytes or an answer arrive.
    """

    env: Mapping[str, str] = field(repr=False)
    claims: Path = Path(naming.CLAIMS_PATH)
    allow_file: bool = False
    patient: bool = True
    beat: Callable[[], None] = _nothing


class Place(Protocol):
    """The files below one URI. Every method raises FinetuneError and nothing else for what the place does."""

    @property
    def uri(self) -> str:
        """The address, for messages and digests."""

    @property
    def revision(self) -> str | None:
        """The commit of an hf:// repository, else None."""

    def files(self) -> tuple[SourceFile, ...]:
        """All files in the order of their names; one file under its own name if the URI names a file.

        Asked once, then remembered. Raises ModelNotFound or DataNotFound when there is none.
        """

    def read_start(self, name: str, size: int) -> bytes:
        """The first size bytes of a file, fewer if it is shorter."""

    def stream(self, name: str) -> Iterator[bytes]:
        """A file's bytes in pieces."""

    def bring(self, name: str, path: Path) -> None:
        """Make the file appear at path, whole: a download, or a link to a mounted file."""


def read_whole(place: Place, name: str, limit: int, *, field: str) -> bytes:
    """A small file's bytes; raises FinetuneError(ModelUnsupported) if it is larger than limit bytes."""
    data = place.read_start(name, limit + 1)
    if len(data) > limit:
        raise FinetuneError(
            f"{place.uri}: {name} is larger than the {limit} bytes that are allowed for it. Check the file.",
            failure_class="ModelUnsupported",
            field=f"spec.{field}",
        )
    return data


def checked_name(name: str, uri: str, field: str) -> str:
    """The name if it stays inside the folder it is written to, else FinetuneError(UnsafeFile)."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        raise FinetuneError(
            f"{uri} holds a file with the unsafe name {name[:80]!r}. Rename or remove it.",
            failure_class="UnsafeFile",
            field=f"spec.{field}",
        )
    return name


def suffix(name: str) -> str:
    """The lower-case ending of a file name with its dot, for example `.jsonl`."""
    return PurePosixPath(name).suffix.lower()


def model_digest(files: Iterable[SourceFile]) -> str:
    """Digest of names, sizes and etags: equal for equal files, wherever it is computed."""
    return digest(_rows(files))


def data_digest(sources: Iterable[tuple[str, Sequence[SourceFile]]]) -> str:
    """Digest of all data: (URI, files) of each input in the order of the run file's inputs."""
    return digest([[uri, _rows(files)] for uri, files in sources])


def _rows(files: Iterable[SourceFile]) -> list[list[str | int]]:
    return [[file.name, file.size, file.etag] for file in sorted(files)]
