"""How an attempt ended, by what its pods and its Job say."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.documents import TerminationMessage
from finetune_operator.decide.evidence import cause_of_failure, checkpoint_in
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
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", "Unknown"),
        ("DeadlineExceeded", "Job was active longer than specified deadline", "Hang"),
    ],
)
def test_without_pods_the_job_tells(reason: str, text: str, expected: str) -> None:
    job = an_attempt(finished="Failed", reason=reason, message=text)
    assert cause_of_failure(job, []).failure_class == expected


def test_the_newest_checkpoint_of_any_pod_counts() -> None:
    pods = [ended(a_pod(index=i), 100, message("Stopped", checkpoint_step=step)) for i, step in enumerate((4, 8))]
    assert checkpoint_in(pods) == 8
    assert checkpoint_in([a_pod()]) is None


def test_control_characters_in_a_message_never_reach_a_person() -> None:
    pod = ended(a_pod(), 65, message("DataInvalid", "row \u001b[31m7\u202e is broken\u0000"))
    assert cause_of_failure(JOB, [pod]).message == "row  [31m7  is broken"
