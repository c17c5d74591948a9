"""How an attempt ended, by what its pods and its Job say."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.documents import TerminationMessage
from finetune_api.failures import TABLE, Fault
from finetune_operator.decide.evidence import cause_of_failure, lost_node
from finetune_operator.snapshot import PodView
from tests.unit.operator.builders import a_pod, an_attempt, ended, later

JOB = an_attempt(finished="Failed", reason="PodFailurePolicy")


def message(outcome: str, text: str = "", **fields: Any) -> str:
    """The agent's last words."""
    return TerminationMessage(outcome=outcome, message=text, **fields).encode().decode()


@pytest.mark.parametrize(
    ("exit_code", "fields", "expected"),
    [
        (65, {"termination_message": message("DataInvalid", "row 7 is broken")}, "DataInvalid"),
        (65, {"termination_message": "not json"}, "DataInvalid"),
        (1, {}, "Unknown"),
        (137, {"exit_reason": "OOMKilled"}, "OutOfHostMemory"),
        (137, {"exit_reason": "ContainerStatusUnknown"}, "NodeLost"),
        (255, {"exit_reason": "Unknown"}, "NodeLost"),
        (255, {"exit_reason": "Error"}, "Unknown"),
        (143, {"disruption": "EvictionByEvictionAPI"}, "Evicted"),
        (143, {"disruption": "PreemptionByScheduler"}, "Evicted"),
        (143, {"disruption": "DeletionByTaintManager"}, "NodeLost"),
        (
            137,
            {
                "reason": "Evicted",
                "disruption": "TerminationByKubelet",
                "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "10Gi".',
            },
            "DiskFull",
        ),
        (100, {"termination_message": message("Stopped")}, "Stopped"),
        (0, {"disruption": "EvictionByEvictionAPI"}, "Evicted"),
        # The agent saved and said Stopped; the pod's own condition tells why it was asked to.
        (100, {"termination_message": message("Stopped"), "disruption": "EvictionByEvictionAPI"}, "Evicted"),
        (102, {"termination_message": message("RolledBack", "half the micro batch")}, "RolledBack"),
        # Spot notices reach a pod as a drain (eviction), as a taint, or as a node that shuts down.
        (
            143,
            {"reason": "Terminated", "message": "Pod was terminated in response to imminent node shutdown."},
            "Evicted",
        ),
        (137, {"reason": "Preempting", "message": "Preempted in order to admit critical pod"}, "Evicted"),
        (137, {"disruption": "DeletionByPodGC"}, "NodeLost"),
        (143, {"disruption": "TerminationByKubelet", "reason": "Terminated"}, "Evicted"),
        (
            143,
            {"reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the specified deadline"},
            "Evicted",
        ),
        # The runtime could not start the container: its words are in the termination message.
        (
            128,
            {
                "exit_reason": "StartError",
                "termination_message": 'failed to create containerd task: exec: "python": executable file not found',
            },
            "ContainerCannotRun",
        ),
        (127, {"exit_reason": "ContainerCannotRun", "termination_message": "no such file"}, "ContainerCannotRun"),
        (
            128,
            {
                "exit_reason": "StartError",
                "termination_message": "OCI runtime create failed: nvidia-container-cli: initialization error: "
                "nvml error: driver not loaded",
            },
            "AcceleratorMismatch",
        ),
        (
            128,
            {
                "exit_reason": "StartError",
                "termination_message": "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, "
                "please update your driver to a newer version",
            },
            "AcceleratorMismatch",
        ),
        # An image for another processor starts and ends at once; the kubelet keeps the end of the log.
        (255, {"termination_message": "exec /usr/local/bin/python: exec format error"}, "ContainerCannotRun"),
        (1, {"termination_message": "exec /usr/bin/python: exec format error\n"}, "ContainerCannotRun"),
        (90, {"termination_message": message("AcceleratorMismatch", "driver 470 is too old")}, "AcceleratorMismatch"),
    ],
)
def test_the_class_of_a_container_that_ended(exit_code: int, fields: dict[str, Any], expected: str) -> None:
    pod = ended(a_pod(), exit_code, **{"phase": "Failed", **fields})
    assert cause_of_failure(JOB, [pod]).failure_class == expected


@pytest.mark.parametrize(
    ("reason", "text", "expected"),
    [
        ("Evicted", "The node was low on resource: memory.", "Evicted"),
        ("UnexpectedAdmissionError", "no healthy devices", "AcceleratorMismatch"),
        ("OutOfnvidia.com/gpu", "", "Unschedulable"),
        ("NodeAffinity", "", "Unschedulable"),
        ("TopologyAffinityError", "Resources cannot be allocated with Topology locality", "Unschedulable"),
        ("NodeShutdown", "Pod was rejected as the node is shutting down.", "Unschedulable"),
        ("Preempting", "Preempted in order to admit critical pod", "Evicted"),
        ("", "", "Unknown"),
    ],
)
def test_the_class_of_a_pod_whose_container_never_ran(reason: str, text: str, expected: str) -> None:
    pod = a_pod(phase="Failed", reason=reason, message=text)
    assert cause_of_failure(JOB, [pod]).failure_class == expected


def test_the_cause_comes_before_its_consequences() -> None:
    broken = ended(a_pod(index=1), 85, message("CollectiveFailed"), exit_time=later(10))
    cause = ended(a_pod(index=0), 80, message("OutOfGpuMemory", "rank 0"), exit_time=later(12))
    stopped = ended(a_pod(index=2), 100, message("Stopped"), exit_time=later(9))
    found = cause_of_failure(JOB, [broken, cause, stopped])
    assert (found.failure_class, found.message) == ("OutOfGpuMemory", "rank 0")


def test_the_first_of_two_causes_counts() -> None:
    first = ended(a_pod(index=1), 83, message("NonFiniteLoss"), exit_time=later(10))
    second = ended(a_pod(index=0), 101, message("Internal"), exit_time=later(11))
    assert cause_of_failure(JOB, [second, first]).failure_class == "NonFiniteLoss"


HANG = ended(a_pod(index=0), 84, message("Hang", "rank 0 made no step"), exit_time=later(10))
CONTACT = ended(a_pod(index=0), 85, message("CollectiveFailed", "contact was lost"), exit_time=later(10))
GONE = ended(a_pod(index=1), 137, disruption="DeletionByPodGC", exit_time=later(40))


@pytest.mark.parametrize("survivor", [HANG, CONTACT])
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (GONE, "NodeLost"),
        (a_pod(index=1, phase="Failed", disruption="DeletionByPodGC"), "NodeLost"),
        (ended(a_pod(index=1), 137, exit_reason="ContainerStatusUnknown", exit_time=later(300)), "NodeLost"),
        (ended(a_pod(index=1), 143, disruption="PreemptionByScheduler", exit_time=later(40)), "Evicted"),
    ],
)
def test_what_the_cluster_did_to_a_pod_explains_the_silence_that_the_others_saw_first(
    survivor: PodView, other: PodView, expected: str
) -> None:
    found = cause_of_failure(JOB, [survivor, other])
    assert (found.failure_class, found.node) == (expected, "node-1")
    assert not TABLE[expected].counted


@pytest.mark.parametrize(
    ("exit_code", "outcome"), [(65, "DataInvalid"), (80, "OutOfGpuMemory"), (81, "OutOfHostMemory"), (101, "Internal")]
)
def test_a_lost_node_does_not_hide_a_failure_of_another_pod(exit_code: int, outcome: str) -> None:
    failed = ended(a_pod(index=0), exit_code, message(outcome), exit_time=later(10))
    assert cause_of_failure(JOB, [failed, GONE]).failure_class == outcome
    assert cause_of_failure(JOB, [failed], "node-1").failure_class == outcome


def test_a_lost_node_that_was_seen_is_the_cause_also_when_its_pod_is_gone() -> None:
    found = cause_of_failure(JOB, [HANG], "node-1")
    assert (found.failure_class, found.node) == ("NodeLost", "node-1")
    assert found.message == "node node-1 was lost while a pod of the attempt was on it"


def test_the_others_silence_is_a_hang_where_nothing_was_done_to_them() -> None:
    stopped = ended(a_pod(index=1), 100, message("Stopped"), exit_time=later(12))
    killed = ended(a_pod(index=1), 137, exit_reason="Error", exit_time=later(70))
    for others in ([], [stopped], [killed], [a_pod(index=1, deletion_time=later(70))]):
        assert cause_of_failure(JOB, [HANG, *others]).failure_class == "Hang", others


def test_the_job_still_tells_of_a_disruption_when_the_disrupted_pod_is_gone() -> None:
    text = "Pod team-a/faq-0a1b2-1-1-x has condition DisruptionTarget matching FailJob rule at index 0"
    job = an_attempt(finished="Failed", reason="PodFailurePolicy", message=text)
    found = cause_of_failure(job, [HANG])
    assert (found.failure_class, found.message) == ("Evicted", text)
    data = ended(a_pod(), 65, message("DataInvalid"))
    assert cause_of_failure(job, [data]).failure_class == "DataInvalid"


@pytest.mark.parametrize(
    ("other", "unreachable", "expected"),
    [
        (GONE, [], "node-1"),
        (a_pod(index=1), ["node-1"], "node-1"),
        (a_pod(index=1), [], None),
        (ended(a_pod(index=1), 100, message("Stopped")), ["node-1"], None),
    ],
)
def test_a_lost_node_is_known_by_its_pod_or_by_its_silence_under_it(
    other: PodView, unreachable: list[str], expected: str | None
) -> None:
    assert lost_node([HANG, other], unreachable) == expected


@pytest.mark.parametrize(
    ("reason", "text", "expected"),
    [
        (
            "PodFailurePolicy",
            "Container trainer for pod team-a/faq failed with exit code 86 matching FailJob rule at index 1",
            "StorageUnavailable",
        ),
        (
            "PodFailurePolicy",
            "Pod team-a/faq has condition DisruptionTarget matching FailJob rule at index 0",
            "Evicted",
        ),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", "AttemptDeleted"),
        ("PodFailurePolicy", "some words of a later release", "Unknown"),
        ("DeadlineExceeded", "Job was active longer than specified deadline", "Hang"),
    ],
)
def test_without_pods_the_job_tells(reason: str, text: str, expected: str) -> None:
    job = an_attempt(finished="Failed", reason=reason, message=text)
    assert cause_of_failure(job, []).failure_class == expected


def test_control_characters_in_a_message_never_reach_a_person() -> None:
    pod = ended(a_pod(), 65, message("DataInvalid", "row \u001b[31m7\u202e is broken\u0000"))
    assert cause_of_failure(JOB, [pod]).message == "row  [31m7  is broken"


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"disruption": "EvictionByEvictionAPI"}, "Evicted"),
        ({"disruption": "PreemptionByScheduler"}, "Evicted"),
        ({"disruption": "DeletionByTaintManager"}, "NodeLost"),
        ({"reason": "Terminated", "message": "imminent node shutdown"}, "Evicted"),
        ({"termination_message": message("Stopped")}, "Stopped"),
        ({"termination_message": message("RolledBack")}, "RolledBack"),
    ],
)
def test_no_interruption_uses_up_a_retry(fields: dict[str, Any], outcome: str) -> None:
    cause = cause_of_failure(JOB, [ended(a_pod(), 143, **fields)])
    assert cause.failure_class == outcome
    assert TABLE[outcome].fault == Fault.INTERRUPTION and not TABLE[outcome].counted


def test_a_node_at_fault_is_named() -> None:
    pod = ended(a_pod(index=1), 90, message("AcceleratorMismatch", "no GPU"))
    assert cause_of_failure(JOB, [pod]).node == "node-1"
    lost = ended(a_pod(index=1), 137, disruption="DeletionByTaintManager")
    assert cause_of_failure(JOB, [lost]).node == "node-1"


def test_a_container_that_left_no_message_is_told_with_the_end_of_its_log() -> None:
    log = "step 1\n\x1b[31mSegmentation fault\x1b[0m (core dumped)\n"
    found = cause_of_failure(JOB, [ended(a_pod(), 139, "x" * 1000 + log, exit_reason="Error")])
    assert found.failure_class == "Unknown"
    assert "exit code 139, Error" in found.message
    assert found.message.endswith("Segmentation fault [0m (core dumped)")
    assert len(found.message) < 500
