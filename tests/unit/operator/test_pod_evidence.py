"""Whole pod statuses as API servers give them, by how the pod was interrupted: none uses up a retry."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import naming
from finetune_api.documents import TerminationMessage
from finetune_api.failures import TABLE
from finetune_operator.decide.evidence import cause_of_failure
from finetune_operator.decide.obstacles import why_not_running
from finetune_operator.views import pod_view
from tests.unit.operator.builders import a_job, a_snapshot, an_attempt, later

JOB = an_attempt(finished="Failed", reason="PodFailurePolicy")
STOPPED = TerminationMessage(outcome="Stopped", message="stopped at step 40", checkpoint_step=40).encode().decode()


def pod(phase: str = "Failed", terminated: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A trainer pod that was on gpu-1."""
    times = {"startedAt": "2026-11-22T12:00:20Z", "finishedAt": "2026-11-22T12:01:30Z"}
    state = {"terminated": {**times, **terminated}} if terminated is not None else {}
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-22T12:00:05Z"}
    return {
        "metadata": {
            "name": "faq-0a1b2-1-0-x",
            "uid": "u",
            "creationTimestamp": "2026-11-22T12:00:00Z",
            "labels": {
                naming.LABEL_ROLE: naming.ROLE_TRAINER,
                naming.LABEL_ATTEMPT: "1",
                "batch.kubernetes.io/job-completion-index": "0",
            },
            "ownerReferences": [{"uid": "attempt-1", "controller": True}],
        },
        "spec": {"nodeName": "gpu-1"},
        "status": {
            "phase": phase,
            "containerStatuses": [{"name": naming.TRAINER_CONTAINER, "state": state}] if state else [],
            **status,
            "conditions": [placed, *status.get("conditions", [])],
        },
    }


def disrupted(reason: str, message: str = "") -> list[dict[str, Any]]:
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]


SAVED = {"exitCode": 100, "reason": "Error", "message": STOPPED}
KILLED = {"exitCode": 137, "reason": "Error"}

INTERRUPTED = {
    "drained, and the agent saved": (
        pod(terminated=SAVED, conditions=disrupted("EvictionByEvictionAPI", "Eviction API: evicting")),
        "Evicted",
    ),
    "preempted, and the grace was too short": (
        pod(
            terminated=KILLED,
            conditions=disrupted("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher one"),
        ),
        "Evicted",
    ),
    "a taint of a spot notice or of a silent node": (
        pod(
            terminated=SAVED,
            conditions=disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
        ),
        "NodeLost",
    ),
    "the node object is gone": (
        pod(conditions=disrupted("DeletionByPodGC", "PodGC: node no longer exists")),
        "NodeLost",
    ),
    "node pressure": (
        pod(
            terminated=KILLED,
            reason="Evicted",
            message="The node was low on resource: memory. Threshold quantity: 100Mi, available: 90Mi.",
            conditions=disrupted("TerminationByKubelet", "The node was low on resource: memory."),
        ),
        "Evicted",
    ),
    "graceful shutdown of the node": (
        pod(
            terminated=SAVED,
            reason="Terminated",
            message="Pod was terminated in response to imminent node shutdown.",
            conditions=disrupted("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
        ),
        "Evicted",
    ),
    "graceful shutdown, told by the reason alone": (
        pod(
            terminated=KILLED,
            reason="Terminated",
            message="Pod was terminated in response to imminent node shutdown.",
        ),
        "Evicted",
    ),
    "the node came back and had lost the container": (
        pod(
            terminated={
                "exitCode": 137,
                "reason": "ContainerStatusUnknown",
                "message": "The container could not be located when the pod was terminated",
            }
        ),
        "NodeLost",
    ),
    "deleted by hand, and the agent saved": (pod(terminated=SAVED), "Stopped"),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interruption_is_known_by_the_pods_status(name: str) -> None:
    body, expected = INTERRUPTED[name]
    found = cause_of_failure(JOB, [pod_view(body)])
    assert found.failure_class == expected
    assert found.node == "gpu-1"
    assert not TABLE[expected].counted and TABLE[expected].retriable


def test_the_times_of_a_pod_are_read() -> None:
    view = pod_view(pod(terminated=SAVED))
    assert (view.scheduled, view.started, view.exit_time) == (later(5), later(20), later(90))
    waiting = pod_view(pod("Pending"))
    assert (waiting.scheduled, waiting.started, waiting.exit_time) == (later(5), None, None)


def test_a_container_that_cannot_start_is_known_while_it_waits_and_after_it_failed() -> None:
    said = 'failed to create shim task: OCI runtime create failed: exec: "python": executable file not found in $PATH'
    failed = pod(terminated={"exitCode": 128, "reason": "StartError", "message": said})
    ended = cause_of_failure(JOB, [pod_view(failed)])
    assert ended.failure_class == "ContainerCannotRun"
    assert ended.message == f"pod faq-0a1b2-1-0-x on node gpu-1 could not be started: {said}"
    for reason in ("CreateContainerError", "RunContainerError"):
        waiting = pod("Pending")
        waiting["status"]["containerStatuses"] = [
            {"name": naming.TRAINER_CONTAINER, "state": {"waiting": {"reason": reason, "message": said}}}
        ]
        found = why_not_running(a_snapshot(a_job()), an_attempt(), [pod_view(waiting)], 1)
        assert found is not None and found.failure_class == "ContainerCannotRun"
