"""Cluster DNS: CoreDNS on the pod bridge, reached by pods through the usual Service `kube-dns`."""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.controlplane import API_SERVICE_IP, CLUSTER_DOMAIN
from tests.cluster.paths import write_if_changed
from tests.cluster.processes import Component

NAME = "coredns"
USER = "system:coredns"
SERVICE_IP = "10.96.0.10"
_RULES = [
    {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
]


def component(binary: Path, folder: Path, address: str, kubeconfig: Path) -> Component:
    """CoreDNS for the cluster's own names only: names outside the cluster are refused at once, never looked up."""
    corefile = folder / "Corefile"
    write_if_changed(
        corefile,
        f"""\
. {{
    bind {address}
    errors
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 2
    }}
}}
""",
    )
    return Component(NAME, [str(binary), f"-conf={corefile}", "-dns.port=53"])


def objects(address: str) -> list[Mapping[str, Any]]:
    """Rights of CoreDNS, and its Service with a hand-written EndpointSlice, since CoreDNS is no pod."""
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": USER},
        "rules": _RULES,
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": USER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
    }
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"clusterIP": SERVICE_IP, "ports": ports},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns-host",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": ports,
    }
    return [role, binding, service, endpoints]


def answers(server: str = SERVICE_IP) -> bool:
    """Whether the server resolves `kubernetes.default` to the API server's Service address."""
    name = f"kubernetes.default.svc.{CLUSTER_DOMAIN}"
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    query = secrets.token_bytes(2) + struct.pack(">5H", 0x0100, 1, 0, 0, 0) + labels + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1.0)
        try:
            client.sendto(query, (server, 53))
            answer = client.recv(512)
        except OSError:
            return False
    return answer[:2] == query[:2] and socket.inet_aton(API_SERVICE_IP) in answer
