"""What the platform team sees of its pools."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api import objects
from tests.api.operator_process import OperatorProcess
from tests.api.rest import Api
from tests.api.tenant import Tenant, condition, until
from tests.cluster.local import LocalCluster


@pytest.fixture
def new_pool(api: Api, operator: OperatorProcess) -> Iterator[str]:
    """A pool that has no node yet."""
    api.create("gpupools", objects.pool("h100", "h100", 80, 4.0))
    yield "h100"
    api.delete("gpupools", None, "h100")


def test_a_pool_becomes_ready_with_its_first_whole_node(cluster: LocalCluster, api: Api, new_pool: str) -> None:
    pool = until(
        lambda: api.get("gpupools", None, new_pool),
        lambda pool: condition(pool["status"], "Ready").get("status") == "False",
    )
    assert condition(pool["status"], "Ready")["reason"] == "NoNodes"
    assert pool["status"]["observedGeneration"] == pool["metadata"]["generation"]
    cluster.nodes.add("h100-0", gpus=8, labels={"gpu-pool": new_pool}, taints=[objects.GPU_TAINT])
    try:
        status = until(
            lambda: api.get("gpupools", None, new_pool)["status"],
            lambda status: condition(status, "Ready")["status"] == "True",
        )
        assert (status["nodes"], status["capacity"], status["running"], status["waiting"]) == (1, 8, 0, 0)
        row = cluster.kubectl("get", "gpupools", new_pool, "--no-headers").split()
        assert row[:-1] == ["h100", "h100", "80", "8", "16", "false", "True"]
        cluster.kubectl("cordon", "h100-0")
        status = until(
            lambda: api.get("gpupools", None, new_pool)["status"],
            lambda status: condition(status, "Ready")["status"] == "False",
        )
        assert condition(status, "Ready")["reason"] == "NodesNotReady"
        assert status["capacity"] == 0
    finally:
        cluster.nodes.remove("h100-0")


def test_gpus_that_a_job_holds_are_counted_until_its_end(api: Api, tenant: Tenant) -> None:
    before = until(lambda: api.get("gpupools", None, "a100-40")["status"], lambda status: status.get("nodes") == 2)
    assert before["running"] == 0
    pods = tenant.start("faq", resources={"pool": "a100-40", "gpus": 8, "nodes": 2}, count=2)
    until(lambda: api.get("gpupools", None, "a100-40")["status"]["running"], lambda running: running == 16)
    for pod in pods:
        tenant.succeeds(pod, 100)
    until(lambda: api.get("gpupools", None, "a100-40")["status"]["running"], lambda running: running == 0)
