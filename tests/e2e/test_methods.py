"""LoRA, QLoRA and Full through the whole system, with what a tenant finds in S3 at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Tenant


@pytest.mark.parametrize(("method", "artifact"), [("LoRA", "adapter"), ("QLoRA", "adapter"), ("Full", "model")])
def test_a_job_ends_with_a_loadable_artifact_and_a_report(
    tenant: Tenant, tmp_path: Path, tiny_llama: Path, method: str, artifact: str
) -> None:
    name = f"run-{method.lower()}"
    tenant.apply(tenant.job(name, tuning={"type": method}))
    status = tenant.succeeded(name)
    assert status["attempt"] == 1 and status["state"] == "Succeeded"
    assert status["progress"]["step"] == 4
    keys = [key.removeprefix(f"out/{name}/") for key in tenant.keys(f"out/{name}/")]
    assert {"report.json", "report.md", "loss.png", "metrics.jsonl"} <= set(keys)
    assert any(key.startswith(f"{artifact}/") and key.endswith(".safetensors") for key in keys)
    report = json.loads(tenant.s3.get_object(Bucket=tenant.namespace, Key=f"out/{name}/report.json")["Body"].read())
    assert report["evaluation"]["tuned"]["loss"] == pytest.approx(status["artifacts"]["evalLoss"], rel=1e-6)
    if artifact == "adapter":
        loads_with_plain_peft(tenant, f"out/{name}/adapter/", tmp_path, tiny_llama)


def loads_with_plain_peft(tenant: Tenant, prefix: str, folder: Path, base: Path) -> None:
    """The adapter from S3 loads with PeftModel.from_pretrained and changes what the base model says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for key in tenant.keys(prefix):
        tenant.s3.download_file(tenant.namespace, key, str(folder / key.removeprefix(prefix)))
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits.detach()
    after = PeftModel.from_pretrained(model, folder)(ids).logits
    assert after.isfinite().all() and not torch.equal(before, after)


def test_a_job_on_two_processes_ends_with_one_adapter(tenant: Tenant) -> None:
    tenant.apply(tenant.job("two", resources={"gpus": 2}))
    status = tenant.succeeded("two")
    assert (
        status["plan"]["gpusPerNode"] == 2
        and status["plan"]["gradientAccumulation"] * status["plan"]["microBatchSize"] == 2
    )


def test_the_listing_shows_state_progress_loss_eta_pool_attempt_and_age(tenant: Tenant) -> None:
    tenant.apply(tenant.job("listed"))
    tenant.succeeded("listed")
    table = tenant.stand.cluster.kubectl("get", "ftj", "-n", tenant.namespace).splitlines()
    assert table[0].split() == ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "POOL", "ATTEMPT", "AGE"]
    row = table[1].split()
    assert row[0:4] == ["listed", "Succeeded", "100%", "4/4"]
    assert "cpu" in row and "1" in row
