"""How attempts end, and what follows: a user's error ends the job, a fault is retried, an interruption costs nothing."""

from __future__ import annotations

import time

import pytest

from tests.api.tenant import Tenant, condition, is_true, until
from tests.cluster.local import LocalCluster


def outcomes(tenant: Tenant) -> list[tuple[int, str]]:
    return [(record["number"], record["outcome"]) for record in tenant.status("faq").get("attempts", [])]


def test_an_error_of_the_user_ends_the_job_at_once(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    message = "dataset.sources[0]: row 17 of train.jsonl has no completion"
    began = time.monotonic()
    tenant.fails(pod, "DataInvalid", message, field="spec.dataset.sources[0]")
    cluster.kubectl("wait", "ftj/faq", "-n", tenant.namespace, "--for=condition=Failed", "--timeout=60s")
    assert time.monotonic() - began < 60
    status = tenant.status("faq")
    assert status["state"] == "Failed"
    assert status["failure"] == {
        "class": "DataInvalid",
        "message": message,
        "field": "spec.dataset.sources[0]",
        "retriable": False,
        "hint": "Correct the rows that the message lists and apply the job again.",
        "runbook": "docs/failures.md#datainvalid",
    }
    assert condition(status, "Failed")["reason"] == condition(status, "Stalled")["reason"] == "DataInvalid"
    assert outcomes(tenant) == [(1, "DataInvalid")]
    time.sleep(2)
    assert outcomes(tenant) == [(1, "DataInvalid")], "it was tried again"


def test_a_fault_is_tried_again_after_its_backoff(tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.fails(pod, "Hang", "rank 0 made no step for 300 s", checkpoint_step=40)
    status = tenant.wait_state("faq", "Retrying")
    assert status["failures"] == 1
    assert status["failure"]["class"] == "Hang"
    assert status["nextAttemptTime"] > status["attempts"][0]["endTime"]
    [pod] = tenant.running("faq", attempt=2)
    status = tenant.wait("faq", is_true("Training"))
    assert status["attempt"] == 2
    assert status["attempts"][0]["checkpointStep"] == 40
    tenant.succeeds(pod, 100)
    tenant.wait("faq", is_true("Succeeded"))
    assert outcomes(tenant) == [(1, "Hang"), (2, "Succeeded")]


def test_the_retry_budget_ends(tenant: Tenant) -> None:
    [pod] = tenant.start("faq", retry={"maxFailures": 1})
    tenant.fails(pod, "Hang")
    [pod] = tenant.running("faq", attempt=2)
    tenant.fails(pod, "Hang")
    status = tenant.wait("faq", is_true("Failed"))
    assert (status["failures"], status["failure"]["class"]) == (2, "Hang")
    assert outcomes(tenant) == [(1, "Hang"), (2, "Hang")]


@pytest.mark.parametrize(
    ("code", "reason", "failure_class"),
    [(137, "OOMKilled", "OutOfHostMemory"), (82, None, "DiskFull"), (3, None, "Unknown")],
)
def test_a_pod_that_leaves_no_message_is_known_by_its_exit(
    tenant: Tenant, code: int, reason: str | None, failure_class: str
) -> None:
    [pod] = tenant.start("faq", retry={"maxFailures": 0})
    tenant.end(pod, "", code, reason)
    status = tenant.wait("faq", is_true("Failed"))
    assert status["failure"]["class"] == failure_class
    assert pod["metadata"]["name"] in status["failure"]["message"]


def test_an_eviction_costs_no_retry(tenant: Tenant) -> None:
    [pod] = tenant.start("faq", retry={"maxFailures": 0})
    tenant.api.evict(tenant.namespace, pod["metadata"]["name"])
    [pod] = tenant.running("faq", attempt=2)
    status = tenant.wait("faq", lambda status: status.get("attempt") == 2)
    assert (status["interruptions"], status.get("failures")) == (1, None)
    assert outcomes(tenant) == [(1, "Evicted")]
    tenant.succeeds(pod, 100)
    tenant.wait("faq", is_true("Succeeded"))


def test_a_deleted_attempt_is_an_interruption(tenant: Tenant) -> None:
    tenant.start("faq", retry={"maxFailures": 0})
    tenant.wait("faq", is_true("Training"))
    [job] = tenant.jobs("faq")
    tenant.api.delete("jobs", tenant.namespace, job["metadata"]["name"])
    tenant.running("faq", attempt=2)
    assert outcomes(tenant) == [(1, "AttemptDeleted")]
    status = tenant.status("faq")
    assert (status["interruptions"], status.get("failures")) == (1, None)


def test_five_interruptions_without_a_checkpoint_end_the_job(tenant: Tenant) -> None:
    tenant.start("faq")
    for attempt in range(1, 6):
        [pod] = tenant.running("faq", attempt=attempt)
        tenant.wait("faq", lambda status, n=attempt: is_true("Training")(status) and status["attempt"] == n)
        tenant.api.evict(tenant.namespace, pod["metadata"]["name"])
    status = tenant.wait("faq", is_true("Failed"))
    assert status["failure"]["class"] == "NoProgress"
    assert status["interruptions"] == 5


def test_one_pod_of_a_gang_ends_the_whole_attempt(tenant: Tenant) -> None:
    pods = tenant.start("faq", count=2, resources={"pool": "a100-40", "gpus": 8, "nodes": 2})
    tenant.fails(pods[1], "OutOfGpuMemory", "CUDA out of memory on rank 9")
    status = tenant.wait("faq", lambda status: status.get("failures") == 1)
    assert status["failure"]["class"] == "OutOfGpuMemory"
    assert len(tenant.running("faq", attempt=2, count=2)) == 2
    until(
        lambda: [pod for pod in tenant.pods("faq", "trainer", 1) if pod["status"]["phase"] == "Running"],
        lambda left: not left,
    )


def test_a_node_that_is_lost_under_a_gang_costs_no_retry_though_the_other_node_hung_and_its_pod_is_gone(
    cluster: LocalCluster, tenant: Tenant
) -> None:
    spec = {"retry": {"maxFailures": 0}, "resources": {"pool": "a100-40", "gpus": 8, "nodes": 2}}
    pods = tenant.start("faq", count=2, **spec)
    tenant.wait("faq", is_true("Training"))
    node = pods[1]["spec"]["nodeName"]
    cluster.nodes.lose(node)
    try:
        tenant.fails(pods[0], "Hang", "rank 0 made no step for 60 s")
        tenant.wait("faq", lambda status: status.get("current", {}).get("avoidNode") == node)
    finally:
        cluster.nodes.recover(node)  # it has restarted, and its kubelet ends the pod that the Job controller deleted
    status = tenant.wait("faq", lambda status: status.get("attempts"))
    assert outcomes(tenant) == [(1, "NodeLost")]
    assert status["attempts"][0]["avoidNode"] == node
    assert (status["interruptions"], status.get("failures")) == (1, None)


def test_a_lost_node_is_avoided_by_the_next_attempt(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq", resources={"pool": "a100-80", "gpus": 8})
    tenant.wait("faq", is_true("Training"))
    node = pod["spec"]["nodeName"]
    cluster.nodes.lose(node)
    try:
        # What the node controller does 30 s later, when the pod's toleration of the unreachable node ends.
        tenant.api.delete("pods", tenant.namespace, pod["metadata"]["name"])
        [pod] = tenant.running("faq", attempt=2, seconds=60)
        assert pod["spec"]["nodeName"] != node
        assert outcomes(tenant) == [(1, "NodeLost")]
        assert tenant.status("faq")["interruptions"] == 1
    finally:
        cluster.nodes.recover(node)


def test_a_gang_that_finds_no_room_gives_up_and_uses_no_retry(tenant: Tenant) -> None:
    tenant.api.patch("gpupools", None, "a40", {"spec": {"startTimeoutSeconds": 10}})
    try:
        tenant.apply("faq", resources={"pool": "a40", "gpus": 8, "nodes": 3})
        tenant.preflight("faq")
        status = tenant.wait("faq", lambda status: condition(status, "Scheduled").get("reason") == "Unschedulable")
        assert "nvidia.com/gpu" in condition(status, "Scheduled")["message"]
        status = tenant.wait("faq", lambda status: status.get("attempts"))
        assert status["attempts"][0]["outcome"] == "Unschedulable"
        assert status.get("failures") is None
        assert not is_true("Failed")(status)
    finally:
        tenant.api.patch("gpupools", None, "a40", {"spec": {"startTimeoutSeconds": 60}})
