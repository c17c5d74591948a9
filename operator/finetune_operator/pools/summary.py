"""What a GPUPool's status is, given the nodes and jobs that there are. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.pool import GPUPoolSpec, GPUPoolStatus, Provisioning
from finetune_api.status import Condition, ConditionStatus, ConditionType

READY = "Ready"


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the pools see it. `allocatable` holds Kubernetes quantities."""

    labels: Mapping[str, str]
    ready: bool
    allocatable: Mapping[str, str]

    def belongs_to(self, pool: GPUPoolSpec) -> bool:
        """Whether the pool's pods may run here by the pool's node selector."""
        return all(self.labels.get(key) == value for key, value in (pool.node_selector or {}).items())

    def gpus(self, pool: GPUPoolSpec) -> int:
        """GPUs that pods may have; processes on a cpu pool."""
        if pool.resource_name is None:
            return pool.gpus_per_node
        text = self.allocatable.get(pool.resource_name, "0")
        return int(text) if text.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Demand:
    """The GPUs that an unfinished job holds (its pods may start), or waits for."""

    pool: str
    gpus: int
    held: bool


def node(body: Mapping[str, Any]) -> Node:
    """The node of an API object; a cordoned node is not ready for new pods."""
    status = body.get("status") or {}
    ready = any(c.get("type") == READY and c.get("status") == "True" for c in status.get("conditions") or [])
    cordoned = bool((body.get("spec") or {}).get("unschedulable"))
    return Node(
        dict(body["metadata"].get("labels") or {}), ready and not cordoned, dict(status.get("allocatable") or {})
    )


def demand(body: Mapping[str, Any]) -> Demand | None:
    """What a FineTuneJob asks of its pool; None before the plan, after the end and while it is suspended."""
    status = body.get("status") or {}
    plan = status.get("plan")
    true = {c.get("type") for c in status.get("conditions") or [] if c.get("status") == "True"}
    if not plan or ConditionType.FINISHED in true:
        return None
    held = bool((status.get("current") or {}).get("released"))
    if not held and (ConditionType.SUSPENDED in true or (body.get("spec") or {}).get("suspend")):
        return None
    return Demand(plan["pool"], plan["nodes"] * plan["gpusPerNode"], held)


def summarize(
    name: str,
    spec: GPUPoolSpec,
    generation: int,
    nodes: Iterable[Node],
    demands: Iterable[Demand],
    before: Condition | None,
    now: str,
) -> GPUPoolStatus:
    """The status of one pool; `before` is its Ready condition as it stands, `now` an RFC 3339 time."""
    own = [node for node in nodes if node.belongs_to(spec)]
    asked = [demand for demand in demands if demand.pool == name]
    ready, reason, message = _ready(spec, own)
    changed = before is None or before.status != ready
    condition = Condition(
        type=READY,
        status=ready,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=now if before is None or changed else before.last_transition_time,
    )
    return GPUPoolStatus(
        observed_generation=generation,
        nodes=len(own),
        capacity=sum(node.gpus(spec) for node in own if node.ready),
        running=sum(demand.gpus for demand in asked if demand.held),
        waiting=sum(demand.gpus for demand in asked if not demand.held),
        conditions=[condition],
    )


def _ready(spec: GPUPoolSpec, own: list[Node]) -> tuple[ConditionStatus, str, str]:
    usable = [node for node in own if node.ready]
    whole = [node for node in usable if node.gpus(spec) >= spec.gpus_per_node]
    if whole:
        return ConditionStatus.TRUE, "NodesReady", f"{len(whole)} of {len(own)} nodes are ready with all their GPUs"
    if spec.provisioning == Provisioning.AUTOSCALED:
        return ConditionStatus.TRUE, "Autoscaled", "nodes come on demand"
    if not own:
        labels = ", ".join(f"{key}={value}" for key, value in sorted((spec.node_selector or {}).items()))
        return (
            ConditionStatus.FALSE,
            "NoNodes",
            (
                f"no node has the labels {labels}; label the nodes or correct nodeSelector"
                if labels
                else "the cluster has no node"
            ),
        )
    if not usable:
        return ConditionStatus.FALSE, "NodesNotReady", f"none of {len(own)} nodes is ready for pods"
    most = max(node.gpus(spec) for node in usable)
    return (
        ConditionStatus.FALSE,
        "TooFewGPUs",
        (
            f"gpusPerNode is {spec.gpus_per_node}, the largest ready node has {most} {spec.resource_name}; "
            "install the device plugin or correct gpusPerNode"
        ),
    )
