"""The e2e tier: chart, images, operator pod, trainer pods and S3 on a real cluster; only the GPUs are missing.

One cluster serves the whole session. Each test has a namespace and a bucket of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.stand import Stand, stand, upload_folder
from tests.train.models import tiny_model

RUN_SECONDS = 240
ANSWER_SECONDS = 60
RECORDS = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}."} for n in range(40)]
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def running() -> Iterator[Stand]:
    """The cluster with operator and S3; stopped at the end unless it was up before."""
    with stand(os.environ.get("CLUSTER", "auto")) as ready:  # type: ignore[arg-type]
        yield ready
    if os.environ.get("KEEP_CLUSTER") != "1":
        ready.cluster.down()


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A two-layer Llama with a tokenizer, as a folder."""
    return tiny_model("llama")


@dataclass(frozen=True)
class Tenant:
    """A namespace with a bucket that holds a tiny model and records."""

    stand: Stand
    namespace: str

    @property
    def s3(self) -> Any:
        """A boto3 client with the tenant's own keys."""
        return self.stand.s3_client(self.namespace)

    def put(self, key: str, text: str) -> str:
        """Write an object; returns its URI."""
        self.s3.put_object(Bucket=self.namespace, Key=key, Body=text.encode())
        return f"s3://{self.namespace}/{key}"

    def keys(self, prefix: str) -> list[str]:
        """Names of the objects below prefix."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.namespace, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def job(self, name: str, **changes: Any) -> dict[str, Any]:
        """A FineTuneJob on the tiny model; changes are merged into spec by top-level field."""
        spec: dict[str, Any] = {
            "model": {"uri": f"s3://{self.namespace}/models/tiny"},
            "dataset": {"sources": [{"uri": f"s3://{self.namespace}/data/train.jsonl"}]},
            "tuning": {"type": "LoRA"},
            "hyperparameters": {"maxSteps": 4, "globalBatchSize": 4},
            "output": {"uri": f"s3://{self.namespace}/out/{name}"},
            "credentials": {"secretName": f"{self.namespace}-s3"},
        }
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": {**spec, **changes},
        }

    def apply(self, job: dict[str, Any]) -> None:
        """`kubectl apply`, as a person does."""
        self.stand.cluster.kubectl("apply", "-n", self.namespace, "-f", "-", input=yaml.safe_dump(job))

    def status(self, name: str) -> dict[str, Any]:
        """The status of the job."""
        return dict(self.stand.job(self.namespace, name).get("status", {}))

    def succeeded(self, name: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Wait for the end; fails the test at once with the failure's own words if the job fails."""
        status = self.until(name, "Finished", lambda s: condition(s, "Finished") == "True", seconds)
        assert condition(status, "Succeeded") == "True", json.dumps(status.get("failure"), indent=2)
        return status

    def failed(self, name: str) -> dict[str, Any]:
        """`kubectl wait --for=condition=Failed` returns within 60 s; the status then."""
        start = time.monotonic()
        self.stand.wait(self.namespace, name, "Failed", ANSWER_SECONDS)
        print(f"{name}: Failed after {time.monotonic() - start:.1f} s")
        return self.status(name)

    def until(self, name: str, what: str, holds: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """Poll the status until holds(status); fails with what was waited for and the last status."""
        end = time.monotonic() + seconds
        while True:
            status = self.status(name)
            if holds(status):
                return status
            if time.monotonic() > end:
                pytest.fail(
                    f"{name}: {what} did not come within {seconds:.0f} s; status: {json.dumps(status, indent=1)}"
                )
            time.sleep(0.5)

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The trainer pods of the job."""
        selector = f"finetune.dev/job={name},finetune.dev/role=trainer"
        return list(self.stand.cluster.kubectl.json("get", "pods", "-n", self.namespace, "-l", selector)["items"])

    def jobs(self, name: str) -> list[dict[str, Any]]:
        """The attempts' batch Jobs."""
        selector = f"finetune.dev/job={name},finetune.dev/role=trainer"
        return list(self.stand.cluster.kubectl.json("get", "jobs", "-n", self.namespace, "-l", selector)["items"])


def condition(status: dict[str, Any], kind: str) -> str | None:
    """The status of a condition."""
    return next((c["status"] for c in status.get("conditions", []) if c["type"] == kind), None)


def lines(records: list[dict[str, Any]]) -> str:
    """Records as jsonl."""
    return "".join(json.dumps(record) + "\n" for record in records)


@contextmanager
def fresh_tenant(running: Stand, model: Path, records: list[dict[str, Any]]) -> Iterator[Tenant]:
    """A tenant with the model and the records in a bucket of its own; the namespace goes when the block ends."""
    namespace = f"team-{next(_numbers)}-{os.getpid() % 10000}"
    running.tenant(namespace)
    made = Tenant(running, namespace)
    upload_folder(made.s3, model, namespace, "models/tiny")
    made.put("data/train.jsonl", lines(records))
    yield made
    running.cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture
def tenant(running: Stand, tiny_llama: Path) -> Iterator[Tenant]:
    """A fresh tenant with the tiny model and 40 records."""
    with fresh_tenant(running, tiny_llama, RECORDS) as made:
        yield made
