"""A second real node beside the first: containerd and kubelet of its own, pods on the same bridge.

It is there to be lost: its kubelet can stop while its containers run on, as on a node that the network cut off.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.cluster import container_runtime, image_loading, images, kubelet, network
from tests.cluster.container_runtime import ContainerRuntime
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kubectl import Kubectl
from tests.cluster.network import Network
from tests.cluster.paths import cache_root
from tests.cluster.processes import Component, ProcessTable, http_ok

NODE_NAME = "node-1"
CONTAINERD, KUBELET = "containerd-1", "kubelet-1"
ADDRESS = "10.244.0.2"
KUBELET_HEALTH = 10258
READY_SECONDS = 90.0


class SecondNode:
    """Starts and removes the node; services are proxied and names resolved by the first node, on the same machine."""

    COMPONENTS = (CONTAINERD, KUBELET)

    def __init__(self, cluster_folder: Path) -> None:
        self.folder = cluster_folder / NODE_NAME
        self.runtime = ContainerRuntime(self.folder, root=cache_root() / "containerd-1")

    @property
    def exists(self) -> bool:
        """Whether the cluster has it."""
        return self.folder.exists()

    def components(self, net: Network, plane: ControlPlane, binary: Callable[[str], Path]) -> dict[str, Component]:
        """The node's processes, in the order in which they start."""
        place = kubelet.Place(KUBELET, NODE_NAME, self.folder, ADDRESS, KUBELET_HEALTH)
        return {
            CONTAINERD: replace(self.runtime.component(net, images.PAUSE_TAG), name=CONTAINERD),
            KUBELET: kubelet.component(place, self.runtime, plane, binary("kubelet")),
        }

    def start(
        self, table: ProcessTable, net: Network, plane: ControlPlane, binary: Callable[[str], Path], kubectl: Kubectl
    ) -> None:
        """Returns once the node is Ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        network.add_address(ADDRESS)
        container_runtime.make_cgroup(self.runtime.cgroup)
        parts = self.components(net, plane, binary)
        table.start(parts[CONTAINERD])
        table.wait_ready(CONTAINERD, self.runtime.ready)
        if table.pid(KUBELET) is None:
            # What an earlier cluster left in the image store would be taken for pods of this one.
            self.runtime.remove_containers()
        image_loading.load_pause(self.runtime)
        table.start(parts[KUBELET])
        table.wait_ready(KUBELET, lambda: self.ready(KUBELET))
        kubectl("wait", "--for=create", f"node/{NODE_NAME}", f"--timeout={READY_SECONDS:.0f}s")
        kubectl("wait", "--for=condition=Ready", f"node/{NODE_NAME}", f"--timeout={READY_SECONDS:.0f}s")

    def ready(self, name: str) -> bool:
        """Whether the component answers its own health check."""
        if name == CONTAINERD:
            return self.runtime.ready()
        return http_ok(f"http://127.0.0.1:{KUBELET_HEALTH}/healthz")

    def stop(self, table: ProcessTable) -> None:
        """No container and no process of the node runs."""
        table.stop(KUBELET)
        if table.pid(CONTAINERD) is not None and self.runtime.ready():
            self.runtime.remove_containers()
        table.stop(CONTAINERD)

    def clean(self) -> None:
        """Nothing of the node is left on the machine, but shims that outlived its containerd: they go with the cluster."""
        if self.exists:
            container_runtime.kill_cgroup(self.runtime.cgroup)
            network.unmount_below(self.folder)
            container_runtime.remove_cgroup(self.runtime.cgroup)
            shutil.rmtree(self.folder, ignore_errors=True)
