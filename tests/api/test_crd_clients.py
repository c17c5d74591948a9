"""What people and GitOps tools see of the two kinds through stock clients."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.naming import MANAGER_OPERATOR, MANAGER_PROGRESS
from tests.api import objects
from tests.api.rest import Api
from tests.api.tenant import until
from tests.cluster.local import LocalCluster

pytestmark = pytest.mark.usefixtures("without_operator")

PROGRESS = {
    "attempt": 1,
    "stage": "Training",
    "step": 420,
    "totalSteps": 1000,
    "percent": 42,
    "loss": 1.234,
    "etaSeconds": 7440,
    "summary": "42% 420/1000",
    "lossText": "1.234",
    "eta": "2h04m",
    "updateTime": "2026-01-01T00:00:00Z",
}


def without_description(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of the fields that say nothing about themselves."""
    bare = []
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        if here != "metadata" and not child.get("description", "").strip():
            bare.append(here)
        bare += without_description(child, here)
    for inner in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            bare += without_description(inner, path + "[]")
    return bare


def defaults(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of the fields that the API server would fill in."""
    found = [path] if "default" in schema else []
    for name, child in schema.get("properties", {}).items():
        found += defaults(child, f"{path}.{name}".lstrip("."))
    return found + (defaults(schema["items"], path + "[]") if isinstance(schema.get("items"), dict) else [])


def write_status(api: Api, namespace: str, name: str, status: dict[str, Any], manager: str) -> dict[str, Any]:
    body = objects.job(name, namespace)
    del body["spec"]
    return api.apply("finetunejobs", {**body, "status": status}, manager=manager, status=True)


@pytest.mark.parametrize("crd", ["finetunejobs.finetune.dev", "gpupools.finetune.dev"])
def test_every_field_says_what_it_is_and_only_status_has_a_default(api: Api, crd: str) -> None:
    [version] = api.get("customresourcedefinitions", None, crd)["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    assert without_description(schema) == []
    assert defaults(schema) == ["status"]


def test_kubectl_explain_describes_a_nested_field(cluster: LocalCluster) -> None:
    # The OpenAPI documents follow discovery a moment later.
    text = until(
        lambda: cluster.kubectl("explain", "ftj.spec.dataset.sources.uri", check=False),
        lambda said: "couldn't find resource" not in said,
    )
    assert "jsonl, json, csv, parquet or txt" in " ".join(text.split())


def test_kubectl_get_shows_how_a_run_stands(cluster: LocalCluster, api: Api, namespace: str) -> None:
    api.create("finetunejobs", objects.job("faq", namespace))
    write_status(
        api,
        namespace,
        "faq",
        {
            "observedGeneration": 1,
            "state": "Training",
            "attempt": 1,
            "plan": objects.plan("a40"),
            "message": "goes well",
        },
        MANAGER_OPERATOR,
    )
    write_status(api, namespace, "faq", {"progress": {**PROGRESS, "checkpointStep": 400}}, MANAGER_PROGRESS)
    header, row = cluster.kubectl("get", "ftj", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "POOL", "ATTEMPT", "AGE"]
    assert row.split()[:-1] == ["faq", "Training", "42%", "420/1000", "1.234", "2h04m", "a40", "1"]
    wide = cluster.kubectl("get", "ftj", "-n", namespace, "-o", "wide").splitlines()[1]
    assert wide.split()[-3:] == ["400", "goes", "well"]


def test_the_two_writers_of_status_leave_each_other_alone(api: Api, namespace: str) -> None:
    api.create("finetunejobs", objects.job("faq", namespace))
    write_status(api, namespace, "faq", {"observedGeneration": 1, "state": "Training", "attempt": 1}, MANAGER_OPERATOR)
    write_status(api, namespace, "faq", {"progress": PROGRESS}, MANAGER_PROGRESS)
    after = write_status(api, namespace, "faq", {"observedGeneration": 1, "state": "Succeeded"}, MANAGER_OPERATOR)
    assert after["status"] == {"observedGeneration": 1, "state": "Succeeded", "progress": PROGRESS}


def test_applying_the_same_file_again_changes_nothing(cluster: LocalCluster, api: Api, namespace: str) -> None:
    body = objects.job(
        "faq",
        namespace,
        hyperparameters={"learningRate": 2.0e-4, "epochs": 3},
        dataset={"sources": [{"uri": "s3://b/a", "weight": 2}], "validation": {"fraction": 0.1}},
    )
    first = api.apply("finetunejobs", body, manager="gitops")
    write_status(api, namespace, "faq", {"observedGeneration": 1, "state": "Queued"}, MANAGER_OPERATOR)
    again = api.apply("finetunejobs", body, manager="gitops", force=False)
    assert again["spec"] == body["spec"]
    assert again["metadata"]["generation"] == first["metadata"]["generation"]
    # Exit code 0 and no text: what `kubectl diff` says when nothing would change.
    assert cluster.kubectl("diff", "--server-side", "--field-manager=gitops", "-f", "-", input=json.dumps(body)) == ""


def test_jobs_are_found_by_short_name_and_by_category(cluster: LocalCluster, api: Api, namespace: str) -> None:
    api.create("finetunejobs", objects.job("faq", namespace))
    for word in ("ftj", "finetunejob", "ml"):
        found = cluster.kubectl("get", word, "-n", namespace, "-o", "name").split()
        assert "finetunejob.finetune.dev/faq" in found
