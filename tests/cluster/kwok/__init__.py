"""Fake GPU nodes and pods (KWOK) beside a real control plane: the scheduler decides for real, containers do not exist.

`pod.yaml` says which annotations steer a fake pod; `FakeNodes` wraps them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.paths import PACKAGE
from tests.cluster.processes import Component, http_ok

NAME = "kwok"
STAGE_FILES = (PACKAGE / "kwok" / "node.yaml", PACKAGE / "kwok" / "pod.yaml")
ANNOTATIONS = "test.finetune.dev/"
# A label, not an annotation: KWOK lets go of a node that loses the label, but not of one that loses an annotation.
MANAGED = {"test.finetune.dev/node": "fake"}
# Fake pods get loopback addresses, so that a test can serve HTTP on a pod's own IP and needs no root for it.
POD_CIDR = "127.64.0.1/12"
Kubectl = Callable[..., str]


def component(
    binary: Path, kubeconfig: Path, stage_files: Sequence[Path], pod_cidr: str, port: int, extra: Sequence[str]
) -> Component:
    """The KWOK process; it manages only nodes that carry `MANAGED`, and the pods on them."""
    argv = [
        str(binary),
        *(f"--kubeconfig={kubeconfig}", "--manage-all-nodes=false"),
        *(f"--manage-nodes-with-label-selector={key}={value}" for key, value in MANAGED.items()),
        *("--node-lease-duration-seconds=40", f"--cidr={pod_cidr}", "--node-ip=127.0.0.1"),
        f"--server-address=127.0.0.1:{port}",
        *(f"--config={path}" for path in stage_files),
        *extra,
    ]
    return Component(NAME, argv)


def port(argv: Sequence[str]) -> int:
    """The health port in a KWOK command line."""
    address = next(flag for flag in argv if flag.startswith("--server-address="))
    return int(address.rsplit(":", 1)[1])


def ready(argv: Sequence[str]) -> bool:
    """Whether the process with this command line answers its health check."""
    return http_ok(f"http://127.0.0.1:{port(argv)}/healthz")


class FakeNodes:
    """Makes, loses and returns fake nodes, and steers the pods on them, through the API."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl

    def add(
        self,
        name: str,
        *,
        gpus: int = 8,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[Mapping[str, str]] = (),
        capacity: Mapping[str, str] | None = None,
        wait_seconds: float = 20.0,
    ) -> None:
        """Adds a node with `nvidia.com/gpu: gpus` and returns once it is Ready (0 seconds: does not wait).

        Pods on a node whose name starts with `stuck-` never start.
        """
        resources = {"cpu": "96", "memory": "1Ti", "ephemeral-storage": "1Ti", "pods": "110"}
        if gpus:
            resources["nvidia.com/gpu"] = str(gpus)
        resources.update(capacity or {})
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **MANAGED, **(labels or {})},
            },
            "spec": {"taints": list(taints)},
            "status": {"capacity": resources, "allocatable": resources},
        }
        self._kubectl("create", "-f", "-", input=json.dumps(node))
        if wait_seconds:
            self._kubectl("wait", "--for=condition=Ready", f"node/{name}", f"--timeout={wait_seconds:.0f}s")
            self._wait_untainted(name, wait_seconds)

    def remove(self, name: str) -> None:
        """Deletes the node, as a cloud does with a reclaimed machine; the pods on it follow by garbage collection."""
        self._kubectl("delete", "node", name, "--wait=false")

    def lose(self, name: str) -> None:
        """The node goes silent: no heartbeat, its pods frozen, Ready=Unknown as the node controller would say."""
        self._kubectl("label", "node", name, *(f"{key}-" for key in MANAGED))
        self._ready(name, "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")

    def recover(self, name: str) -> None:
        """The node talks again: Ready, and its pods move on."""
        self._kubectl("label", "node", name, *(f"{key}={value}" for key, value in MANAGED.items()))
        self._ready(name, "True", "KubeletReady", "")

    def finish(
        self, namespace: str, pod: str, exit_code: int = 0, message: str = "", reason: str | None = None
    ) -> None:
        """Ends the pod's containers: Succeeded for 0, else Failed, with the termination message."""
        notes = {"termination-message": message, "exit-code": str(exit_code)}
        if reason:
            notes["termination-reason"] = reason
        self.annotate(namespace, pod, notes)

    def annotate(self, namespace: str, pod: str, notes: Mapping[str, str]) -> None:
        """Sets our steering annotations on a pod (keys without their prefix)."""
        patch = {"metadata": {"annotations": {ANNOTATIONS + key: value for key, value in notes.items()}}}
        self._kubectl("patch", "pod", pod, "-n", namespace, "--type=merge", "-p", json.dumps(patch))

    def _ready(self, name: str, status: str, reason: str, message: str) -> None:
        condition = {"type": "Ready", "status": status, "reason": reason, "message": message}
        patch = json.dumps({"status": {"conditions": [condition]}})
        self._kubectl("patch", "node", name, "--subresource=status", "--type=strategic", "-p", patch)

    def _wait_untainted(self, name: str, wait_seconds: float) -> None:
        # The scheduler looks at the taint, which the node controller removes a moment after the condition.
        deadline = time.monotonic() + wait_seconds
        path = "jsonpath={.spec.taints[*].key}"
        while "node.kubernetes.io/not-ready" in self._kubectl("get", "node", name, "-o", path):
            if time.monotonic() > deadline:
                raise TimeoutError(f"node {name} is Ready but still tainted after {wait_seconds:.0f} s")
            time.sleep(0.1)
