"""The operator dies, the job is suspended or deleted: nothing is lost and nothing runs twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hack.stand import OPERATOR_NAMESPACE
from tests.e2e.conftest import Tenant, condition

LONG = {"maxSteps": 400, "globalBatchSize": 4, "learningRate": 0.0005}
# Not at its end before the suspension reaches the pod, on a quick machine either.
LONGER = {**LONG, "maxSteps": 2500}


def _training(status: dict[str, Any]) -> bool:
    return status.get("progress", {}).get("step", 0) >= 3


def test_a_killed_operator_comes_back_and_the_run_goes_on_without_a_second_job(tenant: Tenant) -> None:
    tenant.apply(tenant.job("survivor", hyperparameters=LONG))
    tenant.until("survivor", "training", _training, 120)
    kubectl = tenant.stand.cluster.kubectl
    kubectl(
        "delete",
        "pod",
        "-n",
        OPERATOR_NAMESPACE,
        "-l",
        "app.kubernetes.io/name=finetune-operator",
        "--force",
        "--grace-period=0",
    )
    before = {job["metadata"]["uid"] for job in tenant.jobs("survivor")}
    status = tenant.succeeded("survivor")
    assert {job["metadata"]["uid"] for job in tenant.jobs("survivor")} == before
    assert status["attempt"] == 1 and status.get("failures", 0) == 0 and status.get("interruptions", 0) == 0


def test_suspend_saves_a_checkpoint_and_resume_goes_on_from_it(tenant: Tenant) -> None:
    job = tenant.job("pausing", hyperparameters=LONGER)
    tenant.apply(job)
    tenant.until("pausing", "training", _training, 120)
    job["spec"]["suspend"] = True
    tenant.apply(job)
    tenant.stand.wait(tenant.namespace, "pausing", "Suspended", 60)
    assert [pod for pod in tenant.pods("pausing") if pod["status"]["phase"] == "Running"] == []
    eventually(lambda: tenant.pods("pausing") == [], "the pods go", 30)
    manifests = [key for key in tenant.keys("out/pausing/checkpoints/") if key.endswith("MANIFEST.json")]
    assert manifests, "the suspended run left no checkpoint"
    job["spec"]["suspend"] = False
    tenant.apply(job)
    status = tenant.succeeded("pausing")
    assert status["attempt"] == 2 and status.get("failures", 0) == 0
    fences = {key.split("/")[3] for key in tenant.keys("out/pausing/checkpoints/")}
    assert len(fences) >= 1
    log = tenant.stand.cluster.kubectl("logs", "-n", tenant.namespace, f"job/{status_job(tenant, 'pausing', 2)}")
    assert "resum" in log.lower()


def test_deleting_a_running_job_removes_its_children_and_keeps_its_data(tenant: Tenant) -> None:
    tenant.apply(tenant.job("gone", hyperparameters=LONG, checkpoint={"everySteps": 5}))
    tenant.until("gone", "a checkpoint", lambda s: s.get("progress", {}).get("checkpointStep", 0) >= 5, 120)
    kubectl = tenant.stand.cluster.kubectl
    kubectl("delete", "ftj", "gone", "-n", tenant.namespace)
    kinds = "jobs,pods,configmaps,services,networkpolicies"
    mine = ("get", kinds, "-n", tenant.namespace, "-o", "name", "-l", "finetune.dev/job=gone")
    eventually(lambda: kubectl(*mine).split() == [], "all children go", 90)
    assert any(key.endswith("MANIFEST.json") for key in tenant.keys("out/gone/checkpoints/"))


def test_the_users_object_carries_no_foreign_annotation_or_finalizer(tenant: Tenant) -> None:
    tenant.apply(tenant.job("clean"))
    tenant.succeeded("clean")
    metadata = tenant.stand.job(tenant.namespace, "clean")["metadata"]
    assert "finalizers" not in metadata
    assert set(metadata.get("annotations", {})) <= {"kubectl.kubernetes.io/last-applied-configuration"}
    assert condition(tenant.status("clean"), "Succeeded") == "True"


def eventually(holds: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until holds(); fails with what was waited for."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(1)


def status_job(tenant: Tenant, name: str, attempt: int) -> str:
    """Name of the attempt's batch Job."""
    return next(
        job["metadata"]["name"]
        for job in tenant.jobs(name)
        if job["metadata"]["labels"]["finetune.dev/attempt"] == str(attempt)
    )
