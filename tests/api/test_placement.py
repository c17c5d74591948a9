"""On which pool a job runs, and what its pods ask for there."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import naming
from tests.api.tenant import BILLION, Tenant, condition, is_true
from tests.cluster.local import LocalCluster

# pool, GPUs per node, nodes
GANGS = [("l4", 1, 1), ("a40", 4, 1), ("a100-40", 8, 1), ("a100-80", 8, 2)]

# billions of parameters, method -> the cheapest pool that fits, GPUs
CHEAPEST = [
    (1, "Full", "l4", 1),
    (7, "QLoRA", "l4", 1),
    (13, "LoRA", "a40", 1),
    (30, "LoRA", "a40", 2),
    (70, "QLoRA", "a40", 1),
    (30, "Full", "a100-80", 8),
]


@pytest.mark.parametrize(("pool", "gpus", "nodes"), GANGS)
def test_a_pinned_job_gets_the_pods_of_its_pool(
    cluster: LocalCluster, tenant: Tenant, pool: str, gpus: int, nodes: int
) -> None:
    pods = tenant.start("faq", count=nodes, resources={"pool": pool, "gpus": gpus, "nodes": nodes})
    for pod in pods:
        spec = pod["spec"]
        node = tenant.api.get("nodes", None, spec["nodeName"])
        assert node["metadata"]["labels"]["gpu-pool"] == pool
        assert spec["nodeSelector"] == {"gpu-pool": pool}
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
        resources = spec["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == str(gpus)
        assert resources["requests"]["cpu"] == str(4 * gpus)
        assert resources["requests"]["memory"] == f"{16 * gpus}Gi"
        assert pod["metadata"]["labels"][naming.LABEL_POOL] == pool
        assert spec["terminationGracePeriodSeconds"] == 5
    assert len({pod["spec"]["nodeName"] for pod in pods}) == (nodes if gpus == 8 else 1)
    plan = tenant.status("faq")["plan"]
    assert (plan["pool"], plan["gpusPerNode"], plan["nodes"]) == (pool, gpus, nodes)
    assert plan["poolReason"] == "set by the job"


@pytest.mark.parametrize(("billions", "method", "pool", "gpus"), CHEAPEST)
def test_without_a_pin_the_cheapest_pool_that_fits_is_taken(
    tenant: Tenant, billions: int, method: str, pool: str, gpus: int
) -> None:
    [pod] = tenant.start("faq", parameters=billions * BILLION, tuning={"type": method})
    assert pod["spec"]["nodeSelector"] == {"gpu-pool": pool}
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    assert tenant.status("faq")["plan"]["poolReason"] == "the cheapest pool that fits"


def assert_no_pool_fits(tenant: Tenant, pools: tuple[str, ...]) -> dict[str, Any]:
    status = tenant.wait("faq", is_true("Failed"))
    failure: dict[str, Any] = status["failure"]
    assert failure["class"] == condition(status, "Failed")["reason"] == "NoPoolFits"
    for pool in pools:
        assert f"{pool}: " in failure["message"]
    assert failure["message"] == condition(status, "Planned")["message"]
    assert is_true("Finished")(status) and is_true("Stalled")(status)
    assert tenant.jobs("faq") == []
    return failure


def test_no_fit_ends_the_job_with_what_every_pool_lacks(tenant: Tenant, pools: tuple[str, ...]) -> None:
    tenant.apply("faq", tuning={"type": "Full"})
    tenant.preflight("faq", parameters=70 * BILLION)
    failure = assert_no_pool_fits(tenant, pools)
    assert failure["field"] == "spec.resources"
    assert "needs about" in failure["message"] and "has 24 GiB" in failure["message"]


def test_a_pinned_pool_never_falls_back(tenant: Tenant, pools: tuple[str, ...]) -> None:
    tenant.apply("faq", tuning={"type": "LoRA"}, resources={"pool": "l4", "gpus": 1})
    tenant.preflight("faq", parameters=70 * BILLION)
    failure = assert_no_pool_fits(tenant, pools)
    assert failure["field"] == "spec.resources.pool"


def test_an_unknown_pool_is_named_beside_those_that_exist(tenant: Tenant, pools: tuple[str, ...]) -> None:
    tenant.apply("faq", resources={"pool": "tpu"})
    tenant.preflight("faq")
    failure = assert_no_pool_fits(tenant, pools)
    assert "tpu" in failure["message"]


def test_a_job_that_no_pool_holds_goes_on_once_it_is_mended(tenant: Tenant) -> None:
    tenant.apply("faq", tuning={"type": "Full"})
    tenant.preflight("faq", parameters=70 * BILLION)
    tenant.wait_state("faq", "Invalid")
    tenant.edit("faq", tuning={"type": "QLoRA"})
    tenant.preflight("faq", parameters=70 * BILLION)
    tenant.running("faq")
    assert tenant.status("faq")["plan"]["pool"] == "a40"
