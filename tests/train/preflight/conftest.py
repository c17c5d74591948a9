"""A bucket with a good model and good data, and the preflight file of a job that uses them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_api.runfile import PreflightFile
from tests.cluster.s3 import S3Server
from tests.train.sources.making import model_files, profile_env, upload

ROWS = [{"question": f"Question {k}?", "answer": "An answer. " * (k % 5 + 1)} for k in range(40)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Bucket:
    """One test's prefix of the bucket team-a. env: a pod's environment with the credentials profile `team`."""

    def __init__(self, s3: S3Server) -> None:
        self.s3 = s3
        self.prefix = uuid.uuid4().hex[:8]
        self.env = profile_env("TEAM", s3.environment("team-a"))

    def put(self, name: str, data: bytes) -> str:
        upload(self.s3, "team-a", self.prefix, {name: data})
        return self.uri(name)

    def uri(self, name: str) -> str:
        return f"s3://team-a/{self.prefix}/{name}"

    def keys(self) -> set[str]:
        root = self.s3.data / "team-a" / self.prefix
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_user("team-a")
        server.create_bucket("team-a", owner="team-a")
        server.create_bucket("foreign")
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    bucket = Bucket(s3)
    for name, data in model_files().items():
        bucket.put(f"model/{name}", data)
    bucket.put("train.jsonl", JSONL)
    return bucket


@pytest.fixture
def make_file(bucket: Bucket) -> Callable[..., PreflightFile]:
    """A preflight file; keyword arguments replace top-level fields, `model`, `sources` and `output` may be URIs."""
    access = {"profile": "team", "endpoint": bucket.s3.endpoint}

    def reference(value: Any) -> Any:
        return {"uri": value, "access": access} if isinstance(value, str) else value

    def make(**changes: Any) -> PreflightFile:
        sources = changes.pop("sources", [bucket.uri("train.jsonl")])
        document = {
            "job": {"name": "faq", "namespace": "team-a", "uid": "11111111-2222"},
            "specDigest": "sha256:spec",
            "task": "CausalLM",
            "onExisting": "Fail",
            "sources": [reference(source) for source in sources],
            "model": reference(changes.pop("model", bucket.uri("model"))),
            "output": reference(changes.pop("output", bucket.uri("out"))),
        }
        return PreflightFile.from_json(document | changes)

    return make
