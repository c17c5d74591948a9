"""The status of a GPUPool from the nodes and jobs that there are."""

from __future__ import annotations

from typing import Any

from finetune_api.pool import GPUPoolSpec
from finetune_api.status import Condition, ConditionStatus
from finetune_operator.pools.summary import Demand, Node, demand, node, summarize

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"


def pool(**fields: Any) -> GPUPoolSpec:
    body: dict[str, Any] = {
        "accelerator": "a100-40",
        "gpuMemoryGiB": 40,
        "resourceName": "nvidia.com/gpu",
        "gpusPerNode": 8,
        "maxNodes": 4,
        "provisioning": "Static",
        "startTimeoutSeconds": 600,
        "perGPU": {"cpu": 8, "memoryGiB": 64, "ephemeralStorageGiB": 100},
        "sharedMemoryGiB": 16,
        "terminationGracePeriodSeconds": 60,
        "nodeSelector": {"gpu": "a100"},
        "spot": False,
        "hourlyPriceUSD": 2.5,
        "peakTflops": 312,
    }
    return GPUPoolSpec.from_json({**body, **fields})


def gpu_node(gpus: int = 8, ready: bool = True, label: str = "a100") -> Node:
    return Node({"gpu": label}, ready, {"nvidia.com/gpu": str(gpus)})


def ready(spec: GPUPoolSpec, *nodes: Node, before: Condition | None = None, now: str = NOW) -> Condition:
    return summarize("a100", spec, 3, nodes, [], before, now).conditions[0]


def test_nodes_and_gpus_of_the_pool_alone_are_counted() -> None:
    nodes = [gpu_node(), gpu_node(), gpu_node(ready=False), gpu_node(label="l4")]
    status = summarize("a100", pool(), 3, nodes, [], None, NOW)
    assert (status.nodes, status.capacity, status.observed_generation) == (3, 16, 3)


def test_gpus_held_and_waited_for_are_those_of_the_pools_jobs() -> None:
    demands = [Demand("a100", 8, True), Demand("a100", 2, True), Demand("a100", 4, False), Demand("l4", 1, True)]
    status = summarize("a100", pool(), 3, [gpu_node()], demands, None, NOW)
    assert (status.running, status.waiting) == (10, 4)


def test_a_cpu_pool_counts_processes() -> None:
    spec = pool(accelerator="cpu", resourceName=None, gpusPerNode=2, nodeSelector=None)
    status = summarize("cpu", spec, 1, [Node({}, True, {"cpu": "4"})] * 3, [], None, NOW)
    assert (status.nodes, status.capacity) == (3, 6)
    assert status.conditions[0].status == ConditionStatus.TRUE


def test_why_a_static_pool_is_not_ready() -> None:
    assert ready(pool()).reason == "NoNodes"
    assert "gpu=a100" in ready(pool()).message
    assert ready(pool(), gpu_node(ready=False)).reason == "NodesNotReady"
    few = ready(pool(), gpu_node(gpus=4))
    assert (few.status, few.reason) == (ConditionStatus.FALSE, "TooFewGPUs")
    assert "the largest ready node has 4 nvidia.com/gpu" in few.message


def test_a_pool_with_one_whole_node_is_ready() -> None:
    found = ready(pool(), gpu_node(), gpu_node(ready=False))
    assert (found.status, found.reason) == (ConditionStatus.TRUE, "NodesReady")
    assert found.message == "1 of 2 nodes are ready with all their GPUs"


def test_an_autoscaled_pool_is_ready_without_nodes() -> None:
    found = ready(pool(provisioning="Autoscaled"))
    assert (found.status, found.reason) == (ConditionStatus.TRUE, "Autoscaled")


def test_the_time_of_a_condition_moves_only_with_its_status() -> None:
    first = ready(pool())
    assert ready(pool(), before=first, now=LATER).last_transition_time == NOW
    assert ready(pool(), gpu_node(ready=False), before=first, now=LATER).last_transition_time == NOW
    assert ready(pool(), gpu_node(), before=first, now=LATER).last_transition_time == LATER


def test_a_cordoned_node_offers_nothing() -> None:
    body = {
        "metadata": {"labels": {"gpu": "a100"}},
        "spec": {"unschedulable": True},
        "status": {"allocatable": {"nvidia.com/gpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}]},
    }
    assert not node(body).ready
    del body["spec"]
    assert node(body) == gpu_node()


def fine_tune_job(*true: str, released: bool | None = None, suspend: bool = False) -> dict[str, Any]:
    status: dict[str, Any] = {
        "plan": {"pool": "a100", "nodes": 2, "gpusPerNode": 4},
        "conditions": [{"type": kind, "status": "True"} for kind in true],
    }
    if released is not None:
        status["current"] = {"number": 1, "released": released}
    return {"spec": {"suspend": suspend}, "status": status}


def test_what_a_job_asks_of_its_pool() -> None:
    assert demand({"spec": {}, "status": {"observedGeneration": -1}}) is None
    assert demand(fine_tune_job("Planned")) == Demand("a100", 8, held=False)
    assert demand(fine_tune_job("Planned", released=False)) == Demand("a100", 8, held=False)
    assert demand(fine_tune_job("Planned", "Training", released=True)) == Demand("a100", 8, held=True)
    assert demand(fine_tune_job("Planned", "Suspended", suspend=True)) is None
    assert demand(fine_tune_job("Succeeded", "Finished")) is None


def test_a_job_that_is_stopping_still_holds_its_gpus() -> None:
    assert demand(fine_tune_job("Planned", released=True, suspend=True)) == Demand("a100", 8, held=True)
