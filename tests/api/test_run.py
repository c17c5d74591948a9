"""A run from apply to its end, as its owner sees it."""

from __future__ import annotations

import json

from finetune_api import naming
from finetune_api.documents import Stage
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import spec_digest
from finetune_api.runfile import PreflightFile, RunFile
from tests.api.operator_process import PREFLIGHT_IMAGE, TRAINER_IMAGE
from tests.api.tenant import Tenant, condition, is_true, until
from tests.cluster.local import LocalCluster


def columns(cluster: LocalCluster, tenant: Tenant, name: str) -> list[str]:
    """The cells of the job's row, without its age."""
    return cluster.kubectl("get", "ftj", name, "-n", tenant.namespace, "--no-headers").split()[:-1]


def test_a_job_runs_from_apply_to_succeeded(cluster: LocalCluster, tenant: Tenant) -> None:
    tenant.apply("faq")
    tenant.wait_state("faq", "Preflight")
    tenant.preflight("faq")
    [pod] = tenant.running("faq")
    tenant.wait_state("faq", "Training")

    tenant.trains(pod, 420, 1000, loss=1.2344, eta_seconds=7440)
    tenant.wait("faq", lambda status: status.get("progress", {}).get("step") == 420)
    assert columns(cluster, tenant, "faq") == ["faq", "Training", "42%", "420/1000", "1.234", "2h04m", "l4", "1"]

    tenant.trains(pod, 1000, 1000, loss=1.1, stage=Stage.PUBLISHING, checkpoint_step=1000)
    status = tenant.wait_state("faq", "Publishing")
    assert condition(status, "Checkpointed")["message"] == "at step 1000"

    tenant.succeeds(pod, 1000, base_eval_loss=2.0, eval_loss=1.5)
    cluster.kubectl("wait", "ftj/faq", "-n", tenant.namespace, "--for=condition=Succeeded", "--timeout=30s")
    status = tenant.wait("faq", lambda status: status["progress"]["stage"] == "Done")
    assert columns(cluster, tenant, "faq") == ["faq", "Succeeded", "100%", "1000/1000", "1.100", "l4", "1"]
    assert {c["type"] for c in status["conditions"] if c["status"] == "True"} == {
        "Validated",
        "Planned",
        "Checkpointed",
        "Succeeded",
        "Finished",
    }
    assert status["artifacts"]["adapter"] == "s3://team-a/models/faq/adapter"
    assert (status["artifacts"]["baseEvalLoss"], status["artifacts"]["evalLoss"]) == (2.0, 1.5)
    assert [(record["number"], record["outcome"]) for record in status["attempts"]] == [(1, "Succeeded")]
    assert "current" not in status
    assert "failure" not in status


def test_the_pods_get_the_documents_that_the_trainer_reads(tenant: Tenant) -> None:
    job = tenant.apply("faq")
    uid = job["metadata"]["uid"]
    preflight = until(
        lambda: tenant.api.find("configmaps", tenant.namespace, naming.preflight_name("faq", uid, 1)), bool
    )
    file = PreflightFile.from_json(json.loads(next(iter(preflight["data"].values()))))
    assert file.spec_digest == spec_digest(FineTuneJobSpec.from_json(job["spec"]))
    assert file.job.uid == uid

    tenant.preflight("faq")
    [pod] = tenant.running("faq")
    config_map = tenant.api.get("configmaps", tenant.namespace, naming.attempt_name("faq", uid, 1))
    run = RunFile.from_json(json.loads(next(iter(config_map["data"].values()))))
    assert run.digest() == tenant.status("faq")["plan"]["runDigest"]
    assert run.model.source.uri == "hf://tiiuae/falcon-7b"
    assert config_map["immutable"] is True

    [container] = pod["spec"]["containers"]
    assert (container["name"], container["image"]) == (naming.TRAINER_CONTAINER, TRAINER_IMAGE)
    assert pod["spec"]["automountServiceAccountToken"] is False
    [preflight_pod] = tenant.pods("faq", naming.ROLE_PREFLIGHT) or [None]
    if preflight_pod:
        assert preflight_pod["spec"]["containers"][0]["image"] == PREFLIGHT_IMAGE


def test_the_plan_says_where_each_setting_comes_from(tenant: Tenant) -> None:
    tenant.start("faq", hyperparameters={"learningRate": 1.0e-4, "maxSteps": 1000})
    plan = tenant.status("faq")["plan"]
    settings = {setting["name"]: (setting.get("value"), setting["reason"]) for setting in plan["settings"]}
    assert settings["hyperparameters.learningRate"] == (1.0e-4, "set by the job")
    value, reason = settings["tuning.lora.rank"]
    assert value == 16 and reason != "set by the job"
    assert plan["totalSteps"] == 1000
    assert plan["trainerImage"] == TRAINER_IMAGE


def test_each_step_is_told_by_one_event(tenant: Tenant) -> None:
    [pod] = tenant.start("faq")
    tenant.wait("faq", is_true("Training"))
    tenant.succeeds(pod, 10)
    tenant.wait("faq", is_true("Succeeded"))
    events = until(
        lambda: [
            event
            for event in tenant.api.list("events", tenant.namespace)
            if event["involvedObject"]["kind"] == "FineTuneJob"
        ],
        lambda events: "Completed" in {event["reason"] for event in events},
    )
    reasons = [event["reason"] for event in events]
    assert {"PreflightPassed", "Planned", "PodsRunning", "Completed"} <= set(reasons)
    assert len(reasons) == len(set(reasons)), "the same transition was told twice"
    assert all(event["type"] == "Normal" for event in events)
