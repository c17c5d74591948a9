"""The one real node of the full profile: containerd, kubelet, kube-proxy and CoreDNS on the pod bridge."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster import container_runtime, dns, image_loading, images, kubelet, network
from tests.cluster.container_runtime import ContainerRuntime
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kubectl import Kubectl
from tests.cluster.network import Network, NetworkError
from tests.cluster.paths import write_if_changed
from tests.cluster.processes import Component, ProcessError, ProcessTable, http_ok

NODE_NAME = "node-0"
KUBELET, PROXY = "kubelet", "kube-proxy"
KUBELET_HEALTH, PROXY_HEALTH, PROXY_METRICS = 10248, 10256, 10249
CONTAINER_LOG_LINKS = Path("/var/log/containers")
# The kubelet, the CNI library and the shims write here whatever their flags say.
FIXED_FOLDERS = (
    CONTAINER_LOG_LINKS,
    *(Path("/var/lib/kubelet"), Path("/var/lib/kubelet/device-plugins")),
    *(Path("/var/lib/cni"), Path("/var/lib/cni/results")),
    *(Path("/run/containerd"), Path("/run/containerd/s")),
)
READY_SECONDS = 90.0


class Node:
    """Starts and removes the node's parts; the bridge makes it one per machine."""

    COMPONENTS = (container_runtime.NAME, KUBELET, PROXY, dns.NAME)
    address = network.ADDRESS

    def __init__(self, folder: Path, extra_args: Mapping[str, Sequence[str]]) -> None:
        self.folder = folder
        self.extra_args = extra_args
        self.network = Network(folder)
        self.runtime = ContainerRuntime(folder)
        self._place = kubelet.Place(KUBELET, NODE_NAME, folder, self.address, KUBELET_HEALTH)

    def prepare(self) -> None:
        """The bridge is there, so that the API server can bind to it; raises NetworkError where that is impossible."""
        if os.geteuid() != 0:
            raise NetworkError("the full profile needs root (bridge, containers); the control-plane profile does not")
        self._note_fixed_folders()
        self.network.prepare()
        container_runtime.make_cgroup(self.runtime.cgroup)

    def components(self, plane: ControlPlane, binary: Callable[[str], Path]) -> dict[str, Component]:
        """The node's processes, in the order in which they start."""
        made = (
            self.runtime.component(self.network, images.PAUSE_TAG),
            kubelet.component(self._place, self.runtime, plane, binary(KUBELET)),
            self._proxy(plane, binary(PROXY)),
            dns.component(binary(dns.NAME), self.folder, self.address, plane.kubeconfig_for(dns.USER)),
        )
        return {part.name: self._with_extra(part) for part in made}

    def start(self, table: ProcessTable, plane: ControlPlane, binary: Callable[[str], Path], kubectl: Kubectl) -> None:
        """Returns once the node is Ready and resolves Service names."""
        parts = self.components(plane, binary)
        containerd = parts[container_runtime.NAME]
        table.start(containerd)
        table.wait_ready(containerd.name, self.runtime.ready)
        if table.pid(KUBELET) is None:
            # What an earlier cluster left in the image store would be taken for pods of this one.
            self.runtime.remove_containers()
        image_loading.load_pause(self.runtime)
        kubectl.apply(*dns.objects(self.address))
        for name in (KUBELET, PROXY, dns.NAME):
            table.start(parts[name])
        for name in (KUBELET, PROXY, dns.NAME):
            table.wait_ready(name, functools.partial(self.ready, name))
        kubectl("wait", "--for=condition=Ready", f"node/{NODE_NAME}", f"--timeout={READY_SECONDS:.0f}s")
        deadline = time.monotonic() + READY_SECONDS
        while not dns.answers():
            if time.monotonic() > deadline:
                raise ProcessError(f"cluster DNS does not answer on {dns.SERVICE_IP}:\n{table.log_tail(dns.NAME)}")
            time.sleep(0.2)

    def ready(self, name: str) -> bool:
        """Whether the component answers its own health check."""
        if name == container_runtime.NAME:
            return self.runtime.ready()
        if name == dns.NAME:
            return dns.answers(self.address)
        port = KUBELET_HEALTH if name == KUBELET else PROXY_HEALTH
        return http_ok(f"http://127.0.0.1:{port}/healthz")

    def remove_pods(self, table: ProcessTable) -> None:
        """Ends every container through containerd, where it still answers."""
        if table.pid(container_runtime.NAME) is not None and self.runtime.ready():
            self.runtime.remove_containers()

    def clean(self, table: ProcessTable) -> None:
        """Nothing of the node is left on the machine, however it ended."""
        self.runtime.clean(table)
        self.network.clean()
        self._clean_fixed_folders()

    def _note_fixed_folders(self) -> None:
        """Remembers which of the folders that no flag can move were absent before us."""
        record = self.folder / "absent.json"
        if not record.exists():
            record.write_text(json.dumps([str(path) for path in FIXED_FOLDERS if not path.exists()]))

    def _clean_fixed_folders(self) -> None:
        if CONTAINER_LOG_LINKS.is_dir():
            for link in CONTAINER_LOG_LINKS.iterdir():
                if link.is_symlink() and os.readlink(link).startswith(str(self.folder)):
                    link.unlink()
        record = self.folder / "absent.json"
        if record.exists():
            for name in json.loads(record.read_text()):
                shutil.rmtree(name, ignore_errors=True)
            record.unlink()

    def _with_extra(self, part: Component) -> Component:
        return Component(part.name, [*part.argv, *self.extra_args.get(part.name, ())], part.env)

    def _proxy(self, plane: ControlPlane, binary: Path) -> Component:
        if shutil.which("nft") is None:
            raise NetworkError("nft is not installed; run: hack/bootstrap.sh e2e")
        configuration = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            **{"mode": "nftables", "clusterCIDR": network.POD_CIDR, "hostnameOverride": NODE_NAME},
            "clientConnection": {"kubeconfig": str(plane.kubeconfig_for("system:kube-proxy"))},
            **{"bindAddress": "127.0.0.1", "healthzBindAddress": f"127.0.0.1:{PROXY_HEALTH}"},
            **{"metricsBindAddress": f"127.0.0.1:{PROXY_METRICS}", "nodePortAddresses": [f"{self.address}/32"]},
            # Zero leaves the machine's own connection tracking limits alone.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        path = self.folder / "kube-proxy.json"
        write_if_changed(path, json.dumps(configuration, indent=1))
        return Component(PROXY, [str(binary), f"--config={path}"])
