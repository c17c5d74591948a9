"""Models and data sets of a hub: huggingface_hub against HF_ENDPOINT."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference
from finetune_api.uri import Uri
from finetune_trainer.sources.access import hub_token
from finetune_trainer.sources.place import Purpose, Reach, SourceFile, checked_name
from finetune_trainer.sources.places import not_found
from finetune_trainer.store.errors import from_os_error
from finetune_trainer.store.objects import CHUNK_BYTES

PUBLIC_HUB = "https://huggingface.co"
PATIENT_TRIES = 5
IMPATIENT_TRIES = 2
PATIENT_SECONDS = 30.0
IMPATIENT_SECONDS = 8.0
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
T = TypeVar("T")


class HubPlace:
    """The files of one commit of a repository, or those below a folder in it, or one file."""

    def __init__(self, uri: Uri, reference: Reference, purpose: Purpose, field: str, reach: Reach) -> None:
        self._uri = uri
        self._wanted = reference.revision or "main"
        self._purpose = purpose
        self._field = field
        self._reach = reach
        self._endpoint = (reach.env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
        # False, unlike None, keeps a login that lies on this machine out of a job with credentials of its own.
        self._token: str | bool | None = hub_token(reference.access, reach.env) or (
            False if reference.access.profile else None
        )
        self._timeout = PATIENT_SECONDS if reach.patient else IMPATIENT_SECONDS
        self._tries = PATIENT_TRIES if reach.patient else IMPATIENT_TRIES
        disable_progress_bars()

    @property
    def uri(self) -> str:
        """hf://owner/name or hf://datasets/owner/name, with the path in it."""
        return str(self._uri)

    @property
    def revision(self) -> str | None:
        """The commit that the wanted branch or tag stands for."""
        sha: str | None = self._info.sha
        return sha

    def files(self) -> tuple[SourceFile, ...]:
        """See Place.files."""
        return tuple(sorted(self._paths))

    def read_start(self, name: str, size: int) -> bytes:
        """See Place.read_start."""

        def read() -> bytes:
            data = bytearray()
            for chunk in self._get(name, {"Range": f"bytes=0-{size - 1}"}):
                data += chunk
                if len(data) >= size:
                    break
            return bytes(data[:size])

        return self._call(read)

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place.stream."""
        try:
            for chunk in self._get(name, {}):
                self._reach.beat()
                yield chunk
        except (httpx2.HTTPError, OSError) as error:
            raise self._typed(error) from None

    def bring(self, name: str, path: Path) -> None:
        """See Place.bring."""
        staging = Path(tempfile.mkdtemp(prefix=".hub-", dir=path.parent))
        try:
            fetched = self._call(
                lambda: hf_hub_download(
                    self._uri.container,
                    self._path(name),
                    repo_type=self._repo_type,
                    revision=self.revision,
                    local_dir=staging,
                    endpoint=self._endpoint,
                    token=self._token,
                    etag_timeout=self._timeout,
                )
            )
            Path(fetched).replace(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @property
    def _repo_type(self) -> str:
        return "dataset" if self._uri.dataset else "model"

    @cached_property
    def _info(self) -> Any:
        api = HfApi(endpoint=self._endpoint, token=self._token)
        return self._call(
            lambda: api.repo_info(
                self._uri.container,
                repo_type=self._repo_type,
                revision=self._wanted,
                timeout=self._timeout,
                files_metadata=True,
            )
        )

    @cached_property
    def _paths(self) -> dict[SourceFile, str]:
        path = self._uri.path.rstrip("/")
        folder = f"{path}/" if path else ""
        found: dict[SourceFile, str] = {}
        for sibling in self._info.siblings or []:
            etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
            if sibling.rfilename == path:
                return {SourceFile(path.rsplit("/", 1)[-1], sibling.size or 0, etag): path}
            if sibling.rfilename.startswith(folder):
                name = checked_name(sibling.rfilename.removeprefix(folder), self.uri, self._field)
                found[SourceFile(name, sibling.size or 0, etag)] = sibling.rfilename
        if not found:
            why = f"the repository has no file there at {self._wanted!r}"
            raise not_found(self.uri, self._purpose, self._field, why)
        return found

    def _path(self, name: str) -> str:
        return self._paths[next(file for file in self._paths if file.name == name)]

    def _get(self, name: str, headers: dict[str, str]) -> Iterator[bytes]:
        url = hf_hub_url(
            self._uri.container,
            self._path(name),
            repo_type=self._repo_type,
            revision=self.revision,
            endpoint=self._endpoint,
        )
        # Compressed answers would make ranges and sizes those of the compressed bytes.
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"} | headers
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout, follow_redirects=True) as answer:
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            yield from answer.iter_bytes(CHUNK_BYTES)

    def _call(self, action: Callable[[], T]) -> T:
        for number in range(1, self._tries + 1):
            try:
                value = action()
                self._reach.beat()
                return value
            except HFValidationError as error:
                raise FinetuneError(
                    f"{self._field} is {self.uri}, which is no repository name: {error}",
                    failure_class="InvalidSpec",
                    field=f"spec.{self._field}",
                ) from None
            except (httpx2.HTTPError, OSError) as error:
                if number == self._tries or not _transient(error):
                    raise self._typed(error) from None
                time.sleep(min(2.0**number / 2, 8.0))
        raise AssertionError("unreachable")

    def _typed(self, error: Exception) -> FinetuneError:
        """The error to raise. Never chained: a request holds the token."""
        what = f"cannot read {self.uri} at {self._endpoint}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        match error:
            case GatedRepoError():
                return self._rejected(f"{what}: access to it has to be granted. Accept its terms on the hub, and")
            case RepositoryNotFoundError():
                return not_found(
                    self.uri,
                    self._purpose,
                    self._field,
                    f"the hub at {self._endpoint} has no such repository, or HF_TOKEN does not open it",
                )
            case RevisionNotFoundError():
                field = self._field.removesuffix("uri") + "revision"
                return not_found(self.uri, self._purpose, field, f"it has no revision {self._wanted!r}")
            case LocalEntryNotFoundError():
                return self._unavailable(what, error.__cause__ or error)
            case EntryNotFoundError():
                return not_found(self.uri, self._purpose, self._field, f"the hub has no such file ({status})")
            case _ if status in (401, 403):
                return self._rejected(f"{what}: the hub refused the token (HTTP {status}).")
            case HfHubHTTPError() | httpx2.HTTPError() | ConnectionError() | TimeoutError():
                return self._unavailable(what, error)
            case OSError() if error.errno is not None:
                return from_os_error(error, "write", error.filename or "a downloaded file")
        return self._unavailable(what, error)

    def _rejected(self, what: str) -> FinetuneError:
        return FinetuneError(
            f"{what} Put a valid HF_TOKEN into the secret of the credentials.",
            failure_class="CredentialsRejected",
            field="spec.credentials",
        )

    def _unavailable(self, what: str, error: BaseException) -> FinetuneError:
        status = f" (HTTP {error.response.status_code})" if isinstance(error, HfHubHTTPError) else ""
        return FinetuneError(
            f"{what}: {type(error).__name__}{status}. Check HF_ENDPOINT, and that it can be reached from the cluster.",
            failure_class="StorageUnavailable",
            field=f"spec.{self._field}",
        )


def _transient(error: Exception) -> bool:
    if isinstance(error, LocalEntryNotFoundError):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    return isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError))
