"""Before the plan a job is mended in place: preflight says what is wrong, the mended field is what runs."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import naming
from tests.api.rest import Refused
from tests.api.tenant import Tenant, condition, is_true, refused, until
from tests.cluster.local import LocalCluster

# what the spec asks for, the field that is named
MODEL = {"uri": "hf://a/b"}
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model": {**MODEL, "attention": "Flash"}}, "spec.model.attention"),
    ({"model": {**MODEL, "cache": {"claimName": "models"}}}, "spec.model.cache"),
    ({"objective": {"type": "DPO"}, "hyperparameters": {"packing": True}}, "spec.hyperparameters.packing"),
    ({"evaluation": {"metrics": ["charm"]}}, "spec.evaluation.metrics[0]"),
    ({"queueName": "team-a"}, "spec.queueName"),
]


@pytest.mark.parametrize(("spec", "field"), UNSUPPORTED, ids=[field for _, field in UNSUPPORTED])
def test_a_value_that_cannot_be_honoured_is_refused_by_name(tenant: Tenant, spec: dict[str, Any], field: str) -> None:
    tenant.apply("faq", **spec)
    status = tenant.wait("faq", is_true("Failed"))
    assert (status["failure"]["class"], status["failure"]["field"]) == ("UnsupportedField", field)
    for kind in ("Failed", "Validated"):
        assert condition(status, kind)["reason"] == "UnsupportedField"
        assert field.removeprefix("spec.") in condition(status, kind)["message"]
    assert status["state"] == "Invalid"
    assert tenant.api.list("jobs", tenant.namespace) == []


def test_every_unsupported_field_is_named_at_once(tenant: Tenant) -> None:
    tenant.apply("faq", model={**MODEL, "attention": "Flash"}, queueName="team-a")
    message = tenant.wait("faq", is_true("Failed"))["message"]
    assert "model.attention" in message and "queueName" in message


def test_a_local_file_is_refused_in_a_cluster(tenant: Tenant) -> None:
    tenant.apply("faq", dataset={"sources": [{"uri": "file:///data/train.jsonl"}]})
    failure = tenant.wait("faq", is_true("Failed"))["failure"]
    assert (failure["class"], failure["field"]) == ("InvalidSpec", "spec.dataset.sources[0].uri")
    assert "s3://" in failure["message"]


def test_a_refused_job_is_mended_in_place_and_runs_as_mended(tenant: Tenant) -> None:
    job = tenant.apply("faq", dataset={"sources": [{"uri": "s3://team-a/tarin.jsonl"}]})
    message = "dataset.sources[0].uri: s3://team-a/tarin.jsonl does not exist; the bucket holds train.jsonl"
    tenant.preflight("faq", refused(job["spec"], "DataNotFound", message, "spec.dataset.sources[0].uri"))
    status = tenant.wait_state("faq", "Invalid")
    assert (status["failure"]["class"], status["failure"]["field"]) == ("DataNotFound", "spec.dataset.sources[0].uri")
    assert condition(status, "Validated")["status"] == "False"
    assert condition(status, "Validated")["message"] == message
    assert condition(status, "Failed")["message"].startswith(
        f"{message}. Field: spec.dataset.sources[0].uri. What to do: "
    )
    assert "plan" not in status

    tenant.edit("faq", dataset={"sources": [{"uri": "s3://team-a/train.jsonl"}]})
    tenant.preflight("faq")
    tenant.running("faq")
    status = tenant.wait_state("faq", "Training")
    assert condition(status, "Failed")["status"] == condition(status, "Stalled")["status"] == "False"
    assert "failure" not in status
    run_file = tenant.api.get("configmaps", tenant.namespace, naming.attempt_name("faq", job["metadata"]["uid"], 1))[
        "data"
    ]
    assert "s3://team-a/train.jsonl" in str(run_file)
    assert "tarin" not in str(run_file)


def test_an_edit_during_preflight_starts_it_again_with_the_new_spec(tenant: Tenant) -> None:
    uid = tenant.apply("faq")["metadata"]["uid"]
    first = naming.preflight_name("faq", uid, 1)
    until(lambda: tenant.pods("faq", naming.ROLE_PREFLIGHT), lambda pods: pods)
    tenant.edit("faq", hyperparameters={"maxSteps": 77})
    until(lambda: tenant.api.find("jobs", tenant.namespace, first), lambda found: found is None)
    tenant.preflight("faq")
    tenant.running("faq")
    status = tenant.status("faq")
    assert status["plan"]["totalSteps"] == 77
    assert status["observedGeneration"] == 2


def test_a_planned_run_is_not_edited_and_goes_on(cluster: LocalCluster, tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    with pytest.raises(Refused) as refusal:
        tenant.edit("faq", hyperparameters={"maxSteps": 77})
    assert refusal.value.fields == ["spec.hyperparameters"]
    tenant.succeeds(pod, 10)
    tenant.wait("faq", is_true("Succeeded"))


def test_a_preflight_that_cannot_reach_the_storage_is_tried_again(tenant: Tenant) -> None:
    job = tenant.apply("faq")
    tenant.preflight("faq", refused(job["spec"], "StorageUnavailable", "s3.example.com did not answer"))
    status = tenant.wait("faq", lambda status: status.get("failures") == 1)
    assert not is_true("Failed")(status)
    until(
        lambda: [pod for pod in tenant.pods("faq", naming.ROLE_PREFLIGHT) if pod["status"]["phase"] == "Running"], bool
    )
    tenant.preflight("faq")
    tenant.running("faq")
