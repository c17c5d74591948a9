"""The operator is killed (SIGKILL) at any point of a job's life: the run goes on, and no attempt is started twice."""

from __future__ import annotations

import time

import pytest

from finetune_api import naming
from tests.api.operator_process import OperatorProcess
from tests.api.tenant import Tenant, is_true, until


def killed_after(operator: OperatorProcess, seconds: float) -> None:
    time.sleep(seconds)
    operator.kill()
    assert operator.pid is None
    operator.start()


def assert_one_attempt(tenant: Tenant) -> None:
    [job] = tenant.jobs("faq")
    status = tenant.status("faq")
    assert job["metadata"]["name"].endswith("-1")
    assert status["current"]["jobUID"] == job["metadata"]["uid"]
    assert (status["attempt"], status.get("attempts", []), status.get("failures")) == (1, [], None)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.4, 0.8])
def test_killed_while_it_starts_an_attempt(operator: OperatorProcess, tenant: Tenant, delay: float) -> None:
    tenant.apply("faq")
    tenant.preflight("faq")
    killed_after(operator, delay)
    tenant.running("faq", seconds=60)
    tenant.wait("faq", is_true("Training"))
    assert_one_attempt(tenant)


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_killed_while_it_starts_the_preflight(operator: OperatorProcess, tenant: Tenant, delay: float) -> None:
    tenant.apply("faq")
    killed_after(operator, delay)
    tenant.preflight("faq", seconds=60)
    tenant.running("faq")
    assert len(tenant.jobs("faq", naming.ROLE_PREFLIGHT)) <= 1


def test_killed_while_the_run_goes_on(operator: OperatorProcess, tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.wait("faq", is_true("Training"))
    before = tenant.get("faq")
    operator.kill()
    tenant.trains(pod, 50, 100)
    operator.start()
    tenant.wait("faq", lambda status: status.get("progress", {}).get("step") == 50, 60)
    assert_one_attempt(tenant)
    after = tenant.get("faq")
    assert tenant.running("faq")[0]["metadata"]["uid"] == pod["metadata"]["uid"]
    assert {**after["status"], "progress": None} == {**before["status"], "progress": None}, "a restart wrote something"


def test_what_ended_while_the_operator_was_down_is_caught_up_with(operator: OperatorProcess, tenant: Tenant) -> None:
    [pod] = tenant.start("faq", hyperparameters={"maxSteps": 100})
    tenant.wait("faq", is_true("Training"))
    operator.kill()
    tenant.succeeds(pod, 100)
    until(lambda: tenant.jobs("faq")[0]["status"].get("succeeded"), lambda count: count == 1)
    operator.start()
    status = tenant.wait("faq", is_true("Succeeded"), 60)
    assert [(record["number"], record["outcome"]) for record in status["attempts"]] == [(1, "Succeeded")]
    tenant.wait("faq", lambda status: status.get("progress", {}).get("summary") == "100% 100/100")


def test_a_job_deleted_while_the_operator_was_down_leaves_nothing(operator: OperatorProcess, tenant: Tenant) -> None:
    tenant.start("faq")
    operator.kill()
    tenant.api.delete("finetunejobs", tenant.namespace, "faq")
    until(lambda: tenant.pods("faq", naming.ROLE_TRAINER), lambda pods: pods == [])
    operator.start()
    tenant.start("faq")
    assert_one_attempt(tenant)


def test_a_clean_stop_gives_the_lease_to_the_next(operator: OperatorProcess, tenant: Tenant) -> None:
    operator.stop()
    lease = tenant.api.get("leases", "finetune-system", "finetune-operator")
    assert not lease["spec"].get("holderIdentity")
    operator.start()
    tenant.apply("faq")
    tenant.preflight("faq", seconds=60)
