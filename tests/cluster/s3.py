"""A real S3 server (versitygw) on loopback for the train and api tiers.

`tests.cluster.s3_pod` runs the same server as a pod of the full cluster.
"""

from __future__ import annotations

import abc
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from tests.cluster import tools
from tests.cluster.processes import Component, ProcessTable, free_port, http_ok, port_is_free

REGION = "us-east-1"
HEALTH_PATH = "/healthz"
NAME = "versitygw"


class S3Error(RuntimeError):
    """The S3 server or its admin interface refused something; the message carries its own words."""


class S3Accounts(abc.ABC):
    """Users and buckets of one S3 server, wherever it runs; a subclass says how to reach it."""

    # Base URL for clients on this machine: path-style addressing, region `REGION`, no TLS.
    endpoint: str

    def __init__(self) -> None:
        self.access_key = "root-" + secrets.token_hex(4)
        self.secret_key = secrets.token_hex(16)
        self.users: dict[str, str] = {}

    @abc.abstractmethod
    def admin(self, *arguments: str) -> str:
        """Runs one `versitygw admin` command as root and returns what it printed; raises S3Error when it fails."""

    def add_user(self, access_key: str, secret_key: str | None = None, role: str = "user") -> dict[str, str]:
        """Creates an IAM user and returns its AWS_* variables; `user` sees own buckets, `userplus` may create some."""
        secret = secret_key or secrets.token_hex(16)
        self.admin("create-user", "--access", access_key, "--secret", secret, "--role", role)
        self.users[access_key] = secret
        return self.environment(access_key)

    def create_bucket(self, name: str, owner: str | None = None) -> str:
        """Creates a bucket owned by the user (default: root) and returns its `s3://` URI."""
        self.admin("create-bucket", "--bucket", name, "--owner", owner or self.access_key)
        return f"s3://{name}"

    def environment(self, access_key: str | None = None) -> dict[str, str]:
        """AWS_* environment variables of root or of one user, endpoint and region included."""
        access = access_key or self.access_key
        return {
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": self.users[access] if access_key else self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client_options(self, access_key: str | None = None) -> dict[str, str]:
        """Keyword arguments for `boto3.client("s3", ...)`."""
        variables = self.environment(access_key)
        return {
            "endpoint_url": self.endpoint,
            "region_name": REGION,
            "aws_access_key_id": variables["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": variables["AWS_SECRET_ACCESS_KEY"],
        }


class S3Server(S3Accounts):
    """An S3 server with a folder of its own, on a free loopback port, gone with the test that started it.

    >>> with S3Server() as s3:
    ...     s3.create_bucket("team-a")
    ...     boto3.client("s3", **s3.client_options())

    `stop()` and `start()` simulate an outage: port, data, users and keys stay the same. With `folder` the data outlives
    the object; without it a temporary folder is used and removed.
    """

    def __init__(self, folder: Path | None = None, port: int | None = None) -> None:
        super().__init__()
        self._temporary = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="finetune-s3-"))
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._table = ProcessTable(self.folder)

    @property
    def data(self) -> Path:
        """The folder that holds one sub-folder per bucket, for tests that look at or damage what was stored."""
        return self.folder / "data"

    @property
    def log(self) -> str:
        """The server's log so far: one line per request."""
        return self._table.log_tail(NAME, lines=100_000)

    def start(self) -> S3Server:
        """Returns once the server answers; no error when it already runs."""
        binary = tools.ensure([NAME])[NAME]
        for folder in (self.data, self.folder / "iam"):
            folder.mkdir(parents=True, exist_ok=True)
        if self._table.pid(NAME) is None and not port_is_free(self.port):
            raise S3Error(f"port {self.port} on loopback was taken by another process")
        argv = [
            str(binary),
            *("--port", f"127.0.0.1:{self.port}", "--region", REGION, "--health", HEALTH_PATH),
            # Clients reuse connections and users must take effect at once, as they do on the real S3.
            *("--keep-alive", "--iam-cache-disable", "--iam-dir", str(self.folder / "iam")),
            *("posix", str(self.data)),
        ]
        keys = {"ROOT_ACCESS_KEY_ID": self.access_key, "ROOT_SECRET_ACCESS_KEY": self.secret_key}
        self._table.start(Component(NAME, argv, keys, dies_with_parent=True))
        self._table.wait_ready(NAME, lambda: http_ok(self.endpoint + HEALTH_PATH), 20)
        return self

    def stop(self) -> None:
        """The server is gone: connections are refused until `start()`."""
        self._table.stop(NAME, grace_seconds=3)

    def admin(self, *arguments: str) -> str:
        """Runs one `versitygw admin` command as root and returns what it printed; raises S3Error when it fails."""
        binary = tools.ensure([NAME])[NAME]
        login = ["--access", self.access_key, "--secret", self.secret_key, "--endpoint-url", self.endpoint]
        command = [str(binary), "admin", *login, "--region", REGION, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise S3Error(f"versitygw admin {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
