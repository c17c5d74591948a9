"""From API objects to frozen values."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import naming
from finetune_api.job import TuningType
from finetune_operator.views import child_job, controller_uid, job_view, pod_view
from tests.unit.operator.builders import a_spec, later

LABELS = {naming.LABEL_ROLE: naming.ROLE_TRAINER, naming.LABEL_ATTEMPT: "2"}


def a_body(**fields: Any) -> dict[str, Any]:
    """A batch Job as the API server gives it."""
    return {
        "metadata": {
            "name": "faq-0a1b2-2",
            "namespace": "team-a",
            "uid": "u",
            "resourceVersion": "7",
            "labels": LABELS,
            "creationTimestamp": "2026-11-22T12:00:00Z",
        },
        "spec": {"suspend": True},
        "status": {},
        **fields,
    }


def test_a_child_is_read_by_its_labels() -> None:
    child = child_job(a_body())
    assert child is not None
    assert (child.role, child.number, child.suspended, child.finished) == ("trainer", 2, True, None)
    assert (child.waited(later(5)), child.deleting) == (5.0, False)


def test_waiting_counts_from_the_release() -> None:
    child = child_job(a_body(status={"startTime": "2026-11-22T12:01:00Z"}))
    assert child is not None
    assert child.waited(later(90)) == 30.0


@pytest.mark.parametrize(
    ("conditions", "finished"),
    [
        ([{"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}], None),
        ([{"type": "SuccessCriteriaMet", "status": "True"}], None),
        ([{"type": "Failed", "status": "False"}], None),
        ([{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "True", "reason": "R"}], "Failed"),
        ([{"type": "Complete", "status": "True"}], "Complete"),
    ],
)
def test_a_job_is_finished_when_its_pods_are_and_not_before(conditions: list[Any], finished: str | None) -> None:
    child = child_job(a_body(status={"conditions": conditions}))
    assert child is not None
    assert child.finished == finished


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {naming.LABEL_ROLE: "trainer"},
        {**LABELS, naming.LABEL_ROLE: "other"},
        {**LABELS, naming.LABEL_ATTEMPT: "-1"},
        {**LABELS, naming.LABEL_ATTEMPT: "9" * 30},
    ],
)
def test_what_is_labelled_otherwise_is_no_child(labels: dict[str, str]) -> None:
    body = a_body()
    body["metadata"]["labels"] = labels
    assert child_job(body) is None


def test_only_the_controller_owns() -> None:
    body = a_body()
    body["metadata"]["ownerReferences"] = [{"uid": "a"}, {"uid": "b", "controller": True}]
    assert controller_uid(body) == "b"
    assert controller_uid(a_body()) is None


def test_a_spec_of_another_release_is_a_problem_with_a_field_and_not_a_crash() -> None:
    spec = a_spec().to_json()
    spec["tuning"]["type"] = "Telepathy"
    view = job_view(a_body(spec=spec))
    assert view.spec is None
    assert view.spec_error is not None and view.spec_error[0] == "spec.tuning.type"
    good = job_view(a_body(spec=a_spec().to_json()))
    assert good.spec is not None and good.spec.tuning.type == TuningType.QLORA


def test_a_pod_is_read_with_its_last_words() -> None:
    view = pod_view(
        {
            "metadata": {
                "name": "p",
                "uid": "u",
                "creationTimestamp": "2026-11-22T12:00:00Z",
                "deletionTimestamp": "2026-11-22T12:02:00Z",
                "labels": {**LABELS, "batch.kubernetes.io/job-completion-index": "3"},
                "ownerReferences": [{"uid": "job", "controller": True}],
            },
            "spec": {"nodeName": "gpu-1"},
            "status": {
                "phase": "Failed",
                "reason": "Evicted",
                "message": "low on memory",
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}],
                "containerStatuses": [
                    {"name": "sidecar", "state": {"running": {}}},
                    {
                        "name": "trainer",
                        "state": {
                            "terminated": {
                                "exitCode": 100,
                                "reason": "Error",
                                "message": "{}",
                                "finishedAt": "2026-11-22T12:01:30Z",
                            }
                        },
                    },
                ],
            },
        }
    )
    assert (view.index, view.node, view.job_uid, view.phase) == (3, "gpu-1", "job", "Failed")
    assert (view.exit_code, view.termination_message, view.exit_time) == (100, "{}", later(90))
    assert (view.disruption, view.deletion_time) == ("EvictionByEvictionAPI", later(120))
    assert (view.ended, view.over, view.running) == (True, True, False)


def test_a_pod_without_status_is_pending() -> None:
    view = pod_view({"metadata": {"name": "p", "uid": "u", "creationTimestamp": "2026-11-22T12:00:00Z"}})
    assert (view.phase, view.running, view.over, view.unschedulable) == ("Pending", False, False, "")
