"""`kubectl describe` alone tells the cause, the field to change and whether a retry helps."""

from __future__ import annotations

import re

from finetune_api.documents import Spent
from finetune_api.failures import TABLE
from finetune_api.guards import GuardState, Rollback, RollbackReason
from tests.api.tenant import Tenant, is_true, refused, until
from tests.cluster.local import LocalCluster


def describe(cluster: LocalCluster, tenant: Tenant, reason: str) -> str:
    """What kubectl prints about the job, once it prints an event of that reason; lines joined by single blanks."""

    def printed() -> str:
        return cluster.kubectl("describe", "ftj", "faq", "-n", tenant.namespace)

    text: str = until(printed, lambda said: re.search(rf"^  (Normal|Warning)\s+{reason}\b", said, re.MULTILINE))
    return " ".join(text.split())


def events(text: str) -> str:
    return text.split(" Events: ")[1]


def test_an_error_of_the_user_in_training(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    message = "row 17 of train.jsonl has no completion"
    tenant.fails(pod, "DataInvalid", message, field="spec.dataset.sources[0]")
    tenant.wait("faq", is_true("Failed"))
    text = describe(cluster, tenant, "DataInvalid")
    told = (
        f"{message}. Field: spec.dataset.sources[0]. What to do: Correct the rows that the message lists and apply the "
        "job again. Retried automatically: no. Runbook: docs/failures.md#datainvalid"
    )
    conditions = text.split(" Conditions: ")[1].split(" Current: ")[0]
    assert conditions.count(f"Message: {told} ") >= 2, "Failed and Stalled both tell"
    assert "Warning DataInvalid" in events(text) and told in events(text)
    assert "Retriable: false" in text and "Class: DataInvalid" in text
    assert "Endings: Data Invalid: 1" in text or "Endings: DataInvalid: 1" in text


def test_a_refusal_by_preflight(cluster: LocalCluster, tenant: Tenant) -> None:
    spec = tenant.apply("faq")["spec"]
    why = "s3://team-a answered AccessDenied to the keys of the secret team-a-s3"
    tenant.preflight("faq", refused(spec, "CredentialsRejected", why, "spec.credentials.secretName"))
    tenant.wait_state("faq", "Invalid")
    text = describe(cluster, tenant, "CredentialsRejected")
    told = (
        f"{why}. Field: spec.credentials.secretName. What to do: {TABLE['CredentialsRejected'].hint.rstrip('.')}. "
        "Retried automatically: no. Once it is mended, edit the spec, or set spec.suspend to true and back to false, to "
        "check again. Runbook: docs/failures.md#credentialsrejected"
    )
    assert f"Message: {told} " in text and told in events(text)


def test_a_fault_that_is_retried_until_its_bound(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.end(pod, "", 137, "OOMKilled")
    tenant.wait("faq", lambda status: status.get("failures") == 1)
    text = describe(cluster, tenant, "OutOfHostMemory")
    assert "was killed for using more memory than its limit. Retried automatically: yes, at " in events(text)
    assert "this was failure 1; OutOfHostMemory is retried at most 1×." in events(text)
    [pod] = tenant.running("faq", attempt=2)
    tenant.end(pod, "", 137, "OOMKilled")
    tenant.wait("faq", is_true("Failed"))
    text = " ".join(cluster.kubectl("describe", "ftj", "faq", "-n", tenant.namespace).split())
    assert "OutOfHostMemory came 2 times and is retried at most 1×" in text
    assert "Retried automatically: no. Runbook: docs/failures.md#outofhostmemory" in text


def test_what_guards_did_and_where_the_time_went(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq", deadlineSeconds=3600)
    rollback = Rollback(reason=RollbackReason.SPIKE, onset_step=40, to_step=30, until_step=50, factor=0.5)
    guards = GuardState(micro_batch_divisor=2, rollbacks=(rollback,))
    tenant.trains(pod, 45, 100, guards=guards, eta_seconds=7440, spent=Spent(train=1.0))
    status = tenant.wait("faq", lambda status: status.get("guards"))
    planned = status["plan"]["microBatchSize"]
    assert status["progress"]["microBatchSize"] == status["guards"]["microBatchSize"] < planned
    assert status["progress"]["rollbacks"] == 1
    told = events(describe(cluster, tenant, "MicroBatchHalved"))
    assert "Warning RolledBack" in told
    assert "the loss rose at step 40: the run went back to step 30, with 0.5 of the learning rate" in told
    assert f"instead of {planned} from now on" in told
    assert "Warning SlowerThanPlanned" in told
    assert "needs about 7440 s more" in told
    assert is_true("Training")(tenant.status("faq"))

    tenant.succeeds(pod, 100, spent=Spent(train=2.0))
    status = tenant.wait("faq", is_true("Succeeded"))
    text = " ".join(cluster.kubectl("describe", "ftj", "faq", "-n", tenant.namespace).split())
    assert f"Goodput: Down Seconds: {status['goodput']['downSeconds']}" in text
    seconds = sum(value for name, value in status["goodput"].items() if name.endswith("Seconds"))
    assert seconds > 0
    wide = cluster.kubectl("get", "ftj", "faq", "-n", tenant.namespace, "-o", "wide").splitlines()
    assert "GOODPUT" in wide[0]
    assert str(status["goodput"]["percent"]) in wide[1].split()
    assert status["endings"] == {"Succeeded": 1}
