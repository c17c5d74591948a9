"""A job that starts from the artifact of another job, against a real API server."""

from __future__ import annotations

from finetune_api import naming
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import with_resolved
from finetune_api.runfile import PreflightFile, RunFile
from finetune_api.status import ResolvedModel
from tests.api.tenant import Tenant, condition, passed, until


def test_a_follower_waits_for_the_earlier_job_and_starts_from_its_adapter(tenant: Tenant) -> None:
    follower = tenant.apply("second", model={"fromJob": "first"})
    status = tenant.wait("second", lambda status: "no FineTuneJob first" in status.get("message", ""))
    assert condition(status, "Validated")["reason"] == "WaitingForJob"

    [pod] = tenant.start("first")
    tenant.succeeds(pod, 10)
    tenant.wait_state("first", "Succeeded")

    status = tenant.wait("second", lambda status: status.get("resolved"))
    assert status["resolved"] == [
        {
            "field": "model",
            "job": "first",
            "uri": "hf://tiiuae/falcon-7b",
            "revision": "main",
            "adapter": "s3://team-a/models/first/adapter",
        }
    ]
    name = naming.preflight_name("second", follower["metadata"]["uid"], 1)
    config_map = until(lambda: tenant.api.find("configmaps", tenant.namespace, name), bool)
    file = PreflightFile.model_validate_json(config_map["data"]["preflight.json"])
    assert (file.model.uri, [item.reference.uri for item in file.further]) == (
        "hf://tiiuae/falcon-7b",
        ["s3://team-a/models/first/adapter"],
    )

    resolved = [ResolvedModel.from_json(item) for item in status["resolved"]]
    spec = with_resolved(FineTuneJobSpec.from_json(tenant.get("second")["spec"]), resolved)
    digests = {"model.adapter.uri": "sha256:0c"}
    tenant.preflight("second", passed(spec.to_json()).model_copy(update={"digests": digests}))
    tenant.running("second")
    assert tenant.status("second")["preflight"]["digests"] == digests, "the schema keeps what is not named in it"
    plan = tenant.api.find("configmaps", tenant.namespace, naming.plan_name("second", follower["metadata"]["uid"]))
    run = RunFile.model_validate_json(plan["data"]["run.json"])
    assert (run.model.source.uri, run.model.adapter_digest) == ("hf://tiiuae/falcon-7b", "sha256:0c")
