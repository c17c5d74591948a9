"""The kubelet of one node of the full profile: its configuration and its process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import dns
from tests.cluster.container_runtime import ContainerRuntime
from tests.cluster.controlplane import CLUSTER_DOMAIN, ControlPlane
from tests.cluster.paths import write_if_changed
from tests.cluster.processes import Component


@dataclass(frozen=True)
class Place:
    """Where a kubelet lives. name: of the process; node: of the Kubernetes node; address: on the pod bridge."""

    name: str
    node: str
    folder: Path
    address: str
    health_port: int


def component(place: Place, runtime: ContainerRuntime, plane: ControlPlane, binary: Path) -> Component:
    """Writes the configuration and returns the process."""
    path = place.folder / "kubelet.json"
    write_if_changed(path, json.dumps(_configuration(place, runtime, plane), indent=1))
    argv = [
        str(binary),
        *(f"--config={path}", f"--root-dir={place.folder / 'kubelet'}", f"--cert-dir={place.folder / 'run'}"),
        f"--kubeconfig={plane.kubeconfig_for(f'system:node:{place.node}', ['system:nodes'])}",
        *(f"--hostname-override={place.node}", f"--node-ip={place.address}"),
    ]
    return Component(place.name, argv)


def _configuration(place: Place, runtime: ContainerRuntime, plane: ControlPlane) -> dict[str, object]:
    serving = plane.authority.server(f"{place.name}-serving", [place.address, place.node])
    resolv = place.folder / "resolv.conf"
    write_if_changed(resolv, "# pods with dnsPolicy Default see no outer DNS\n")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        **{"address": place.address, "healthzBindAddress": "127.0.0.1", "healthzPort": place.health_port},
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(plane.authority.pair.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        **{"tlsCertFile": str(serving.certificate), "tlsPrivateKeyFile": str(serving.key)},
        **{"clusterDNS": [dns.SERVICE_IP], "clusterDomain": CLUSTER_DOMAIN, "resolvConf": str(resolv)},
        **{"cgroupDriver": "cgroupfs", "cgroupRoot": f"/{runtime.cgroup}"},
        **{"failCgroupV1": False, "failSwapOn": False},
        "containerRuntimeEndpoint": f"unix://{runtime.socket}",
        # It would write rules for iptables into tables that are not ours.
        "makeIPTablesUtilChains": False,
        # A developer's disk is often nearly full; images are our cache and must not be collected.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        **{"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99},
        **{"podLogsDir": str(place.folder / "pod-logs"), "volumePluginDir": str(place.folder / "volume-plugins")},
    }
