"""The chart: what a platform engineer gets from `helm template`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.pool import GPUPoolSpec
from finetune_operator.config import parse_config
from tests.cluster.tools import ensure

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "finetune-operator"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = ensure(["helm"])["helm"]
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=60)


def render(*arguments: str) -> list[dict[str, Any]]:
    done = helm("template", "finetune", str(CHART), "--namespace", "finetune-system", *arguments)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def test_the_four_default_pools_are_valid_and_priced_in_order() -> None:
    pools = {pool["metadata"]["name"]: GPUPoolSpec.from_json(pool["spec"]) for pool in of_kind(render(), "GPUPool")}
    assert sorted(pools) == ["a100-40", "a100-80", "a40", "l4"]
    assert pools["l4"].hourly_price_usd < pools["a40"].hourly_price_usd < pools["a100-80"].hourly_price_usd
    assert all(pool.resource_name == "nvidia.com/gpu" for pool in pools.values())


def test_a_pool_set_to_null_is_left_out_and_the_cpu_pool_can_be_turned_on() -> None:
    documents = render("--set", "pools.l4=null,cpuPool.enabled=true")
    pools = {pool["metadata"]["name"]: GPUPoolSpec.from_json(pool["spec"]) for pool in of_kind(documents, "GPUPool")}
    assert "l4" not in pools
    assert pools["cpu"].accelerator == "cpu" and pools["cpu"].resource_name is None
    assert {pool.termination_grace_period_seconds for pool in pools.values()} == {60}


def test_the_grace_period_of_every_pool_is_a_value() -> None:
    values = "poolDefaults.terminationGracePeriodSeconds=120,pools.l4.terminationGracePeriodSeconds=25"
    documents = render("--set", f"{values},cpuPool.enabled=true,cpuPool.terminationGracePeriodSeconds=90")
    pools = {pool["metadata"]["name"]: GPUPoolSpec.from_json(pool["spec"]) for pool in of_kind(documents, "GPUPool")}
    found = {name: pool.termination_grace_period_seconds for name, pool in pools.items()}
    assert found == {"l4": 25, "a40": 120, "a100-40": 120, "a100-80": 120, "cpu": 90}


def test_the_operator_has_no_secret_verbs_and_no_wildcards() -> None:
    rules = [rule for role in of_kind(render(), "ClusterRole") + of_kind(render(), "Role") for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "secrets" not in rule["resources"], rule
        assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"], rule
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), rule


def test_the_operator_pod_meets_the_restricted_pod_security_standard() -> None:
    (deployment,) = of_kind(render(), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_images_carry_the_registry_prefix() -> None:
    documents = render("--set", "images.registry=registry.example.com/ml/")
    text = yaml.safe_dump_all(documents)
    for name in ("operator", "preflight", "trainer"):
        assert f"registry.example.com/ml/finetune-{name}:0.1.0" in text


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("imagez.operator=x", "imagez"),
        ("pools.l4.gpuMemoryGB=24", "gpuMemoryGB"),
        ("storage.endpoint=minio:9000", "endpoint"),
        ("images.registry=registry.example.com", "registry"),
    ],
)
def test_a_misspelt_or_malformed_value_is_refused_by_name(values: str, named: str) -> None:
    done = helm("template", "finetune", str(CHART), "--set", values)
    assert done.returncode != 0
    assert named in done.stderr


def test_every_storage_value_reaches_the_operator_under_a_name_that_it_reads() -> None:
    values = (
        "storage.endpoint=https://s3.example.com,storage.region=eu,storage.pathStyle=true,storage.caConfigMapName=ca"
    )
    (deployment,) = of_kind(render("--set", values + ",hubEndpoint=https://hub.example.com"), "Deployment")
    given = {
        entry["name"]: entry.get("value", "")
        for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    config = parse_config(given, identity="pod-1")
    assert config.storage.to_json() == {
        "endpoint": "https://s3.example.com",
        "region": "eu",
        "pathStyle": True,
        "caConfigMapName": "ca",
    }
    assert config.hub_endpoint == "https://hub.example.com"


def test_the_charts_definitions_are_the_generated_ones() -> None:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        assert (CHART / "crds" / path.name).read_text() == path.read_text()


def test_every_key_of_values_yaml_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) <= set(schema["properties"])
