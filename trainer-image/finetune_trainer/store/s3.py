"""The object store on an S3 bucket."""

from __future__ import annotations

import random
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from urllib3.exceptions import HTTPError

from finetune_trainer.store.errors import (
    BucketNotFound,
    ConditionalWriteUnsupported,
    CredentialsRejected,
    ObjectNotFound,
    StorageMisconfigured,
    StorageUnavailable,
    StoreError,
    from_os_error,
)
from finetune_trainer.store.objects import CHUNK_BYTES, ObjectInfo, S3Settings

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 60
PART_BYTES = 64 << 20
TRIES = 6
"""How often each request is sent at most, and each part of a large file: about 8 s of waiting in all."""
LONGEST_WAIT_SECONDS = 20.0

# XAdminUserNotFound is versitygw's word for an access key id that it does not know.
_UNKNOWN_KEY = {"InvalidAccessKeyId", "XAdminUserNotFound", "InvalidClientTokenId"}
_BAD_TOKEN = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "ExpiredTokenException"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_NO_OBJECT = {"NoSuchKey", "NoSuchVersion", "ObjectParentIsFile"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_BUSY_STATUS = {429, 500, 502, 503, 504}
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout"}
_CONDITION_TRIES = 6
_STREAM_TRIES = 5
_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES,
    multipart_chunksize=PART_BYTES,
    max_concurrency=4,
    preferred_transfer_client="classic",
)
_FAILURES = (BotoCoreError, ClientError, Boto3Error, HTTPError)
T = TypeVar("T")


def wait_seconds(tries: int, longest: float = LONGEST_WAIT_SECONDS) -> float:
    """How long to wait after that many tries: on average twice as long each time, and never equally long in two places."""
    return random.uniform(0, min(0.5 * 2 ** (min(tries, 30) - 1), longest))  # noqa: S311  # jitter needs no secrecy


def s3_client(
    settings: S3Settings,
    *,
    max_attempts: int = TRIES,
    read_timeout: float = READ_TIMEOUT_SECONDS,
    longest_wait: float = LONGEST_WAIT_SECONDS,
) -> Any:
    """A boto3 S3 client with explicit timeouts (seconds) and at most max_attempts tries per request.

    A busy server (429, 5xx, SlowDown, RequestTimeout) and a broken connection are tried again. The SDK's own
    retries are off: they take no 429, and all requests of a client share one allowance, which the parts of a few
    large files use up. Each request's body is signed by its SHA-256, which every S3 server checks; the newer
    optional checksum headers, which some servers refuse, are left out. Raises StorageMisconfigured.
    """
    path_style = settings.path_style if settings.path_style is not None else settings.endpoint is not None
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=settings.region or "us-east-1",
            verify=settings.ca_file,
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key,
            aws_session_token=settings.session_token,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT_SECONDS,
                read_timeout=read_timeout,
                retries={"mode": "standard", "total_max_attempts": 1},
                s3={"addressing_style": "path" if path_style else "auto", "payload_signing_enabled": True},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=16,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise StorageMisconfigured(
            f"endpoint {settings.endpoint!r} or region {settings.region!r} cannot be used: {error}. "
            "Write storage.endpoint as http(s)://host[:port]."
        ) from None

    def delay(attempts: int, response: Any, caught_exception: Exception | None, **_: Any) -> float | None:
        again = attempts < max_attempts and _may_help(response, caught_exception)
        return wait_seconds(attempts, longest_wait) if again else None

    client.meta.events.register("needs-retry.s3", delay)
    return client


def _may_help(response: tuple[Any, dict[str, Any]] | None, error: Exception | None) -> bool:
    if response is None:
        return isinstance(error, ConnectionError | HTTPClientError)
    answer, parsed = response
    return answer.status_code in _BUSY_STATUS or parsed.get("Error", {}).get("Code") in _BUSY


class S3Store:
    """Objects in one bucket. Thread-safe, as boto3 clients are.

    client: a boto3 S3 client, injected so that tests can put faults between it and the server.
    endpoint: for messages only. sleep: waits the given seconds between tries of this class's own.
    """

    def __init__(
        self,
        client: Any,
        bucket: str,
        *,
        endpoint: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._endpoint = endpoint or "AWS"
        self._sleep = sleep

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self._bucket}/{key}".rstrip("/")

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes or a file; files above 64 MiB go up in several parts at once."""
        try:
            if isinstance(data, bytes):
                self._whole(lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=data))
            else:
                self._whole(lambda: self._client.upload_file(str(data), self._bucket, key, Config=_TRANSFER))
        except _FAILURES as error:
            raise self._typed(error, "write", key) from None
        except OSError as error:
            raise from_os_error(error, "read", data if isinstance(data, Path) else key) from error

    def copy(self, source: str, key: str, sha256: str) -> bool:
        """Let the server copy, at most 5 GB; True if it reads the content of sha256 there and says so."""
        origin = {"Bucket": self._bucket, "Key": source}
        request = partial(self._client.copy_object, Bucket=self._bucket, Key=key, CopySource=origin)
        try:
            answer = self._whole(lambda: request(ChecksumAlgorithm="SHA256"))
        except _FAILURES:
            return False  # the put that follows says what is wrong, if anything is
        return bool(answer["CopyObjectResult"].get("ChecksumSHA256") == b64encode(bytes.fromhex(sha256)).decode())

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store data if the key is free, by `If-None-Match: *`."""
        for number in range(_CONDITION_TRIES):
            try:
                self._whole(lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=data, IfNoneMatch="*"))
                return True
            except ClientError as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412"):
                    return False
                if code in ("NotImplemented", "501"):
                    raise ConditionalWriteUnsupported(
                        f"the storage at {self._endpoint} refuses If-None-Match on {self.uri(key)}, without "
                        "which two jobs could overwrite one another. Use a server with conditional writes."
                    ) from None
                if code not in _CONFLICT or number + 1 == _CONDITION_TRIES:
                    raise self._typed(error, "write", key) from None
                # Another writer of this key is at work: whoever wins, the next try tells.
                self._wait(number + 1)
            except (BotoCoreError, HTTPError) as error:
                raise self._typed(error, "write", key) from None
        raise AssertionError("unreachable")

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The object's bytes."""
        size = 0
        chunks = []
        for chunk in self.stream(key):
            size += len(chunk)
            if limit is not None and size > limit:
                raise StoreError(f"{self.uri(key)} is larger than the {limit} bytes that are allowed there.")
            chunks.append(chunk)
        return b"".join(chunks)

    def download(self, key: str, path: Path) -> None:
        """Write the object to path; large ones come in several ranges at once."""
        try:
            self._whole(lambda: self._client.download_file(self._bucket, key, str(path), Config=_TRANSFER))
        except _FAILURES as error:
            raise self._typed(error, "read", key) from None
        except OSError as error:
            raise from_os_error(error, "write", path) from error

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from start, all of one version of it."""
        position, etag, failures = start, None, 0
        while True:
            body = None
            try:
                arguments: dict[str, str] = {} if position == 0 else {"Range": f"bytes={position}-"}
                if etag is not None:
                    arguments["IfMatch"] = etag
                answer = self._whole(partial(self._client.get_object, Bucket=self._bucket, Key=key, **arguments))
                body, etag = answer["Body"], answer["ETag"]
                while chunk := body.read(CHUNK_BYTES):
                    position += len(chunk)
                    failures = 0
                    yield chunk
                return
            except ClientError as error:
                if _code(error) == "InvalidRange":
                    return  # start is the object's end
                raise self._typed(error, "read", key) from None
            except (BotoCoreError, HTTPError) as error:
                failures += 1
                # A request that got no answer was retried by the client already; a broken body was not.
                if body is None or failures == _STREAM_TRIES:
                    raise self._typed(error, "read", key) from None
                self._wait(failures)
            finally:
                if body is not None:
                    body.close()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below prefix, a page of 1,000 at a time."""
        try:
            token: dict[str, str] | None = {}
            while token is not None:
                page = self._whole(partial(self._client.list_objects_v2, Bucket=self._bucket, Prefix=prefix, **token))
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # some servers list folders as empty objects
                        yield ObjectInfo(item["Key"], item["Size"], item["ETag"].strip('"'))
                token = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None
        except _FAILURES as error:
            raise self._typed(error, "list", prefix) from None

    def head(self, key: str) -> ObjectInfo:
        """Size and etag."""
        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=key)
        except _FAILURES as error:
            raise self._typed(error, "read", key) from None
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def delete(self, key: str) -> None:
        """Remove the object."""
        try:
            self._whole(lambda: self._client.delete_object(Bucket=self._bucket, Key=key))
        except _FAILURES as error:
            raise self._typed(error, "delete", key) from None

    def _whole(self, send: Callable[[], T]) -> T:
        """What send returns. An answer that breaks off is an error that the SDK neither types nor tries again."""
        for tries in range(1, _STREAM_TRIES):
            try:
                return send()
            except HTTPError:
                self._wait(tries)
        return send()

    def _wait(self, tries: int) -> None:
        self._sleep(wait_seconds(tries))

    def _typed(self, error: Exception, action: str, key: str) -> StoreError:
        """The error to raise. The cause is never chained: its response echoes key ids and signatures."""
        if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
            error = error.__context__  # boto3 hands on nothing but its text
        if isinstance(error, ClientError):
            if re.fullmatch(r"\d+", _code(error)):
                error = self._named(error, key)
            return self._refused(error, f"cannot {action} {self.uri(key)} at {self._endpoint}")
        what = f"cannot {action} {self.uri(key)} at {self._endpoint}: {type(error).__name__}"
        if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
            return CredentialsRejected(
                f"{what}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a service account with access.",
                code=type(error).__name__,
            )
        if isinstance(error, SSLError):
            return StorageUnavailable(
                f"{what}: no trusted TLS connection. Check the scheme of storage.endpoint, and name "
                "the authority of its certificate in storage.caConfigMapName."
            )
        return StorageUnavailable(f"{what}. Check storage.endpoint, and that it can be reached from here.")

    def _named(self, error: ClientError, key: str) -> ClientError:
        """The same refusal with its code: answers to HEAD have no body, so only a GET can tell it."""
        try:
            self._client.get_object(Bucket=self._bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except ClientError as named:
            return named
        except (BotoCoreError, HTTPError):
            pass
        return error

    def _refused(self, error: ClientError, what: str) -> StoreError:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        what = f"{what}: {code}"
        if code in ("NoSuchBucket", "InvalidBucketName"):
            return BucketNotFound(
                f"{what}. Create the bucket {self._bucket!r}, or correct the URI or storage.endpoint."
            )
        if code in _UNKNOWN_KEY:
            return CredentialsRejected(
                f"{what}: the server does not know this access key id (InvalidAccessKeyId). "
                "Check AWS_ACCESS_KEY_ID and storage.endpoint.",
                code="InvalidAccessKeyId",
            )
        if code == "SignatureDoesNotMatch":
            return CredentialsRejected(f"{what}: the secret key is wrong. Check AWS_SECRET_ACCESS_KEY.", code=code)
        if code in _BAD_TOKEN:
            return CredentialsRejected(f"{what}: the session token is no longer valid. Renew it.", code=code)
        if code == "RequestTimeTooSkewed":
            return StorageUnavailable(f"{what}: the clocks of node and server differ. Ask the platform team.")
        if code in _WRONG_REGION or status == 301:
            return StorageMisconfigured(f"{what}: the bucket is in another region. Set storage.region.")
        if code in _NO_OBJECT or status == 404:
            return ObjectNotFound(f"{what}: no such object. Check the URI.")
        if status in (401, 403):
            return CredentialsRejected(
                f"{what}: these credentials may not do that. Grant them access to {self._bucket!r}.",
                code="AccessDenied" if code.isdigit() else code,
            )
        if code in ("PreconditionFailed", "412"):
            return StorageUnavailable(f"{what}: the object changed while it was read. Start the run again.")
        return StorageUnavailable(f"{what} (HTTP {status}). If it lasts, ask the storage's owner.")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "Unknown"))
