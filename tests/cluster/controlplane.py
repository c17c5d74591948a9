"""The control plane as host processes: etcd, API server, controller manager, scheduler.

Nothing here listens outside loopback, except the API server on the address it is given (the pod bridge in the full
profile, so that pods reach it as `kubernetes.default`).
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.certs import Authority, Pair, write_kubeconfig
from tests.cluster.network import SERVICE_CIDR
from tests.cluster.paths import write_if_changed
from tests.cluster.processes import Component, ProcessTable, free_port, port_is_free

LOOPBACK = "127.0.0.1"
API_SERVICE_IP = "10.96.0.1"
CLUSTER_DOMAIN = "cluster.local"
ETCD, API_SERVER = "etcd", "kube-apiserver"
CONTROLLERS, SCHEDULER = "kube-controller-manager", "kube-scheduler"
COMPONENTS = (ETCD, API_SERVER, CONTROLLERS, SCHEDULER)


@dataclass(frozen=True)
class ControlPlane:
    """Where one control plane lives and how its parts find each other."""

    folder: Path
    address: str
    authority: Authority
    ports: Mapping[str, int]
    binaries: Mapping[str, Path]
    extra_args: Mapping[str, Sequence[str]]

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.ports[API_SERVER]}"

    @property
    def kubeconfig(self) -> Path:
        """Admin kubeconfig (group system:masters)."""
        return self.folder / "kubeconfig"

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """Writes the kubeconfig of a client certificate for the user and returns its path."""
        name = user.replace(":", "-")
        pair = self.authority.client(f"client-{name}", user, groups)
        return write_kubeconfig(self.folder / "kubeconfigs" / name, self.url, self.authority, pair)

    def components(self) -> dict[str, Component]:
        """The four processes, in the order in which they start."""
        made = (self._etcd(), self._api_server(), self._controllers(), self._scheduler())
        return {component.name: component for component in made}

    def start(self, table: ProcessTable, dies_with_parent: bool) -> None:
        """Returns once each component says it is ready; raises ProcessError with the log of the one that is not."""
        (self.folder / "kubeconfigs").mkdir(parents=True, exist_ok=True)
        admin = self.authority.client("admin", "finetune-admin", ["system:masters"])
        write_kubeconfig(self.kubeconfig, self.url, self.authority, admin)
        for component in self.components().values():
            self.start_one(table, component, dies_with_parent)

    def start_one(self, table: ProcessTable, component: Component, dies_with_parent: bool) -> None:
        """Starts one component and waits until it is ready."""
        pinned = Component(component.name, component.argv, component.env, dies_with_parent)
        table.start(pinned)
        table.wait_ready(component.name, lambda: self.ready(component.name), 90)

    def ready(self, name: str) -> bool:
        """Whether the component answers its own health check."""
        if name == ETCD:
            return _https_ok(f"https://{LOOPBACK}:{self.ports[ETCD]}/health", self._etcd_client())
        if name == API_SERVER:
            return _https_ok(f"{self.url}/readyz", None)
        return _https_ok(f"https://{LOOPBACK}:{self.ports[name]}/healthz", None)

    def _etcd_client(self) -> Pair:
        return self.authority.client("etcd-client", "etcd-client")

    def _etcd(self) -> Component:
        pair = self.authority.server("etcd", [LOOPBACK])
        url, peer = f"https://{LOOPBACK}:{self.ports[ETCD]}", f"http://{LOOPBACK}:{self.ports['etcd-peer']}"
        argv = [
            str(self.binaries[ETCD]),
            *("--name=test", f"--data-dir={self.folder / 'etcd'}"),
            *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}"),
            # TLS with client certificates: other users of the machine reach loopback too.
            *(f"--cert-file={pair.certificate}", f"--key-file={pair.key}", "--client-cert-auth"),
            f"--trusted-ca-file={self.authority.pair.certificate}",
            # The data need not survive a power cut; fsync would be most of the start time.
            *("--unsafe-no-fsync", "--log-level=warn", "--auto-compaction-retention=10m"),
            f"--quota-backend-bytes={2 * 1024**3}",
        ]
        return self._component(ETCD, argv)

    def _api_server(self) -> Component:
        hosts = [self.address, LOOPBACK, API_SERVICE_IP, "localhost", "kubernetes", "kubernetes.default"]
        hosts += ["kubernetes.default.svc", f"kubernetes.default.svc.{CLUSTER_DOMAIN}"]
        serving, etcd = self.authority.server(API_SERVER, list(dict.fromkeys(hosts))), self._etcd_client()
        to_kubelet = self.authority.client("apiserver-kubelet-client", "kube-apiserver", ["system:masters"])
        tokens = self.authority.signing_key("service-accounts")
        argv = [
            str(self.binaries[API_SERVER]),
            *(f"--bind-address={self.address}", f"--advertise-address={self.address}"),
            *(f"--secure-port={self.ports[API_SERVER]}", f"--service-cluster-ip-range={SERVICE_CIDR}"),
            *(f"--tls-cert-file={serving.certificate}", f"--tls-private-key-file={serving.key}"),
            f"--client-ca-file={self.authority.pair.certificate}",
            f"--etcd-servers=https://{LOOPBACK}:{self.ports[ETCD]}",
            f"--etcd-cafile={self.authority.pair.certificate}",
            *(f"--etcd-certfile={etcd.certificate}", f"--etcd-keyfile={etcd.key}"),
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
            f"--service-account-key-file={tokens.certificate}",
            f"--service-account-signing-key-file={tokens.key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-certificate-authority={self.authority.pair.certificate}",
            *(f"--kubelet-client-certificate={to_kubelet.certificate}", f"--kubelet-client-key={to_kubelet.key}"),
            *("--allow-privileged=true", "--profiling=false", "--cert-dir=" + str(self.folder / "run")),
            # One server only: with the lease reconciler a restart would first wait for the old lease.
            "--endpoint-reconciler-type=master-count",
        ]
        return self._component(API_SERVER, argv)

    def _controllers(self) -> Component:
        tokens = self.authority.signing_key("service-accounts")
        argv = [
            *self._with_kubeconfig(CONTROLLERS),
            f"--service-account-private-key-file={tokens.key}",
            f"--root-ca-file={self.authority.pair.certificate}",
            *("--use-service-account-credentials=true", "--allocate-node-cidrs=false"),
            *(f"--cluster-signing-cert-file={self.authority.pair.certificate}",),
            f"--cluster-signing-key-file={self.authority.pair.key}",
        ]
        return self._component(CONTROLLERS, argv)

    def _scheduler(self) -> Component:
        return self._component(SCHEDULER, self._with_kubeconfig(SCHEDULER))

    def _with_kubeconfig(self, name: str) -> list[str]:
        config = self.kubeconfig_for(f"system:{name}")
        flags = [f"--{kind}kubeconfig={config}" for kind in ("", "authentication-", "authorization-")]
        listen = [f"--bind-address={LOOPBACK}", f"--secure-port={self.ports[name]}", "--leader-elect=false"]
        return [str(self.binaries[name]), *flags, *listen, "--profiling=false"]

    def _component(self, name: str, argv: Sequence[str]) -> Component:
        return Component(name, [*argv, *self.extra_args.get(name, ())])


def choose_ports(path: Path, address: str, table: ProcessTable) -> dict[str, int]:
    """Ports of the components, remembered in the file; a port that somebody else took meanwhile is chosen anew."""
    try:
        known: dict[str, int] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    chosen = {}
    for name in (*COMPONENTS, "etcd-peer"):
        where = address if name == API_SERVER else LOOPBACK
        owner = ETCD if name == "etcd-peer" else name
        keep = name in known and (table.pid(owner) is not None or port_is_free(known[name], where))
        chosen[name] = known[name] if keep else free_port(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(path, json.dumps(chosen))
    return chosen


def _https_ok(url: str, client: Pair | None) -> bool:
    """Whether the URL answers 200; the server's name is not checked, since only health is asked."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    try:
        https = urllib.request.HTTPSHandler(context=context)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
        with opener.open(url, timeout=3) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
