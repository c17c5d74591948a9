"""What the owner does to a job under way: suspend, resume, cancel, delete."""

from __future__ import annotations

from finetune_api import naming
from tests.api.tenant import Tenant, condition, is_true, until

CHILDREN = ("jobs", "pods", "configmaps", "services")


def children(tenant: Tenant) -> list[str]:
    """kind/name of everything that carries the job's label."""
    return [
        f"{plural}/{found['metadata']['name']}"
        for plural in CHILDREN
        for found in tenant.api.list(plural, tenant.namespace, f"{naming.LABEL_JOB}=faq")
    ]


def test_suspend_frees_the_gpus_and_resume_goes_on(tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.trains(pod, 40, 100, checkpoint_step=40)
    tenant.wait("faq", is_true("Checkpointed"))
    tenant.edit("faq", suspend=True)
    status = tenant.wait("faq", is_true("Suspended"))
    assert tenant.pods("faq", naming.ROLE_TRAINER) == []
    assert status["state"] == "Suspended"
    assert not is_true("Reconciling")(status)
    assert (status.get("failures"), status.get("interruptions")) == (None, None)

    tenant.edit("faq", suspend=False)
    [pod] = tenant.running("faq", attempt=2)
    status = tenant.wait("faq", is_true("Training"))
    assert condition(status, "Suspended")["status"] == "False"
    assert [(record["number"], record["outcome"]) for record in status["attempts"]] == [(1, "Suspended")]
    tenant.succeeds(pod, 100)
    tenant.wait("faq", is_true("Succeeded"))


def test_a_job_created_suspended_starts_nothing_until_it_is_resumed(tenant: Tenant) -> None:
    tenant.apply("faq", suspend=True)
    tenant.wait("faq", is_true("Suspended"))
    assert children(tenant) == []
    tenant.edit("faq", suspend=False)
    tenant.preflight("faq")
    tenant.running("faq")


def test_cancel_stops_for_good_and_keeps_what_was_reached(tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.trains(pod, 40, 100, checkpoint_step=40)
    tenant.wait("faq", is_true("Checkpointed"))
    tenant.edit("faq", cancel=True)
    status = tenant.wait_state("faq", "Cancelled")
    assert is_true("Finished")(status) and is_true("Failed")(status)
    assert condition(status, "Failed")["reason"] == "Cancelled"
    assert status["attempts"][0]["outcome"] == "Cancelled"
    assert status["progress"]["step"] == 40
    until(lambda: tenant.pods("faq", naming.ROLE_TRAINER), lambda pods: pods == [])


def test_cancel_before_the_plan_ends_the_preflight(tenant: Tenant) -> None:
    tenant.apply("faq")
    until(lambda: tenant.pods("faq", naming.ROLE_PREFLIGHT), bool)
    tenant.edit("faq", cancel=True)
    tenant.wait_state("faq", "Cancelled")
    until(lambda: tenant.api.list("pods", tenant.namespace), lambda pods: pods == [])


def test_a_deadline_ends_the_job(tenant: Tenant) -> None:
    tenant.start("faq", deadlineSeconds=3)
    status = tenant.wait("faq", is_true("Failed"))
    assert (status["failure"]["class"], status["failure"]["field"]) == ("DeadlineExceeded", "spec.deadlineSeconds")
    until(lambda: tenant.pods("faq", naming.ROLE_TRAINER), lambda pods: pods == [])


def test_deleting_a_job_takes_all_its_children(tenant: Tenant) -> None:
    tenant.start("faq")
    assert {child.partition("/")[0] for child in children(tenant)} == set(CHILDREN)
    tenant.api.delete("finetunejobs", tenant.namespace, "faq")
    until(lambda: children(tenant), lambda left: left == [])
    assert tenant.api.find("finetunejobs", tenant.namespace, "faq") is None


def test_a_new_job_of_the_same_name_starts_afresh(tenant: Tenant) -> None:
    first = tenant.start("faq")[0]["metadata"]["uid"]
    tenant.api.delete("finetunejobs", tenant.namespace, "faq")
    [pod] = tenant.start("faq")
    assert pod["metadata"]["uid"] != first
    assert tenant.status("faq")["attempt"] == 1


def test_children_of_a_finished_job_go_after_their_time(tenant: Tenant) -> None:
    [pod] = tenant.start("faq", ttlSecondsAfterFinished=1)
    tenant.succeeds(pod, 100)
    status = tenant.wait("faq", is_true("Succeeded"))
    until(lambda: tenant.jobs("faq"), lambda jobs: jobs == [])
    assert tenant.status("faq")["artifacts"] == status["artifacts"]
