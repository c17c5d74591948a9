"""One job that a test disturbs: how far it is to the second, what the test does to it, and what that cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_api import naming
from hack.stand import OPERATOR_NAMESPACE
from tests.cluster.kubectl import KubectlError
from tests.e2e.conftest import Tenant

LOOK_SECONDS = 0.2
START_SECONDS = 300.0


@dataclass(frozen=True)
class Watched:
    """A FineTuneJob of a tenant, asked through its own pods: the operator's status is up to 10 s old."""

    tenant: Tenant
    name: str

    def progress(self, attempt: int) -> dict[str, Any] | None:
        """What the agent of the attempt's pod 0 says of its progress; None while it does not answer."""
        kubectl = self.tenant.stand.cluster.kubectl
        for pod in self.pods(attempt):
            if pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0") != "0":
                continue
            path = f"/api/v1/namespaces/{self.tenant.namespace}/pods/{pod['metadata']['name']}:{naming.PROGRESS_PORT}"
            try:
                return dict(json.loads(kubectl("get", "--raw", f"{path}/proxy/progress", timeout=10)))
            except (KubectlError, ValueError):
                return None
        return None

    def pods(self, attempt: int) -> list[dict[str, Any]]:
        """The attempt's pods, in any phase."""
        labels = f"{naming.LABEL_JOB}={self.name},{naming.LABEL_ROLE}={naming.ROLE_TRAINER}"
        selector = f"{labels},{naming.LABEL_ATTEMPT}={attempt}"
        where = ("-n", self.tenant.namespace, "-l", selector)
        return list(self.tenant.stand.cluster.kubectl.json("get", "pods", *where)["items"])

    def pod(self, attempt: int, index: int = 0) -> str:
        """Name of the attempt's pod with this index."""
        return next(
            pod["metadata"]["name"]
            for pod in self.pods(attempt)
            if pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0") == str(index)
        )

    def until(
        self, attempt: int, what: str, holds: Callable[[dict[str, Any]], bool], seconds: float = START_SECONDS
    ) -> dict[str, Any]:
        """Poll the attempt's progress until holds(progress); fails with the job's status when the time is up."""
        end = time.monotonic() + seconds
        while True:
            found = self.progress(attempt)
            if found is not None and holds(found):
                return found
            if time.monotonic() > end:
                status = json.dumps(self.tenant.status(self.name), indent=1)
                pytest.fail(f"{self.name}: {what} in attempt {attempt} not within {seconds:.0f} s: {found}; {status}")
            time.sleep(LOOK_SECONDS)

    def at_step(self, step: int, attempt: int = 1) -> int:
        """Returns once the attempt has made the step; the step that it is at."""
        return int(self.until(attempt, f"step {step}", lambda p: p["step"] >= step)["step"])

    def back(self, lost_at: int, since: float, attempt: int = 2, seconds: float = START_SECONDS) -> Recovery:
        """Wait for the attempt's first step of its own after the fault at `since` (monotonic), which came at a step."""
        found = self.until(attempt, "a new step", lambda p: p["step"] > p.get("resumedFromStep", 0), seconds)
        took = time.monotonic() - since
        before = self.tenant.status(self.name)["attempts"][attempt - 2]
        # The attempt may have made more steps before the fault took hold, and have told the operator of them.
        made = max(lost_at, before.get("step") or 0)
        # It may also have saved one of which nobody heard.
        return Recovery(took, max(0, made - int(found.get("resumedFromStep", 0))))

    def until_silent(self, attempt: int, seconds: float) -> None:
        """Poll until the attempt's agent, which answers at first, does not any more; fails when the time is up."""
        self.until(attempt, "an answer", lambda _: True, seconds)
        end = time.monotonic() + seconds
        while self.progress(attempt) is not None:
            assert time.monotonic() < end, f"{self.name}: attempt {attempt} still runs after {seconds:.0f} s"
            time.sleep(LOOK_SECONDS)

    def losses(self) -> dict[int, float]:
        """Training loss by step, from the run's metrics.jsonl; fails where a step is told twice."""
        key = f"out/{self.name}/metrics.jsonl"
        text = self.tenant.s3.get_object(Bucket=self.tenant.namespace, Key=key)["Body"].read().decode()
        told = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
        found = {line["step"]: line["loss"] for line in told}
        assert len(found) == len(told), f"{self.name}: steps told twice in metrics.jsonl"
        return found

    def delete_pod(self, attempt: int = 1, index: int = 0, *, force: bool = False) -> None:
        """`kubectl delete pod`, without waiting for its end; force: without any time to save."""
        flags = ("--force", "--grace-period=0") if force else ()
        kubectl = self.tenant.stand.cluster.kubectl
        kubectl("delete", "pod", self.pod(attempt, index), "-n", self.tenant.namespace, "--wait=false", *flags)


@dataclass(frozen=True)
class Recovery:
    """seconds: from the fault to the next attempt's first new step. steps_lost: steps that are made once more."""

    seconds: float
    steps_lost: int


def kill_operator(tenant: Tenant) -> None:
    """The operator's pod is gone at once, without a chance to say anything."""
    label = "app.kubernetes.io/name=finetune-operator"
    where = ("-n", OPERATOR_NAMESPACE, "-l", label)
    tenant.stand.cluster.kubectl("delete", "pod", *where, "--force", "--grace-period=0", "--wait=false")
