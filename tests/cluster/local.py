"""A real Kubernetes without Docker: `LocalCluster` starts and stops it as host processes.

Two profiles: `control-plane` (etcd, API server, controllers, scheduler and KWOK on loopback, no root) for the api tier,
and `full` (plus pod bridge, containerd, kubelet, kube-proxy, CoreDNS; root) for e2e and the demo.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.cluster import controlplane, image_loading, kwok, second_node, tools
from tests.cluster.certs import Authority
from tests.cluster.controlplane import ControlPlane, choose_ports
from tests.cluster.kubectl import Kubectl
from tests.cluster.node import NODE_NAME, Node
from tests.cluster.paths import state_dir
from tests.cluster.port_forward import port_forward
from tests.cluster.processes import Component, ProcessTable, boot_id, free_port
from tests.cluster.second_node import SecondNode

Profile = Literal["control-plane", "full"]
READY_SECONDS = 120.0
# Stopped front to back: whoever writes to the API goes before the API.
STOP_ORDER = (kwok.NAME, "coredns", "kube-proxy", "kubelet", *reversed(controlplane.COMPONENTS), "containerd")


class ClusterError(RuntimeError):
    """The cluster did not come up or cannot do what was asked; the message says what to do."""


class LocalCluster:
    """One cluster on this machine; `up()` and `down()` may be called at any time, from any process, in any state.

    >>> with LocalCluster("control-plane", private=True) as cluster:
    ...     cluster.start_kwok()
    ...     cluster.nodes.add("gpu-0", gpus=8)
    ...     cluster.kubectl("get", "nodes")

    As a context manager it ends what it started, and leaves alone a cluster that was already up. `private` gives the
    calling process a cluster of its own, which ends with that process even when it is killed; otherwise all callers
    share the one cluster of the profile. `extra_args` adds flags per component, for instance
    `{"kube-controller-manager": ["--node-monitor-grace-period=12s"]}`.
    """

    def __init__(
        self,
        profile: Profile = "control-plane",
        *,
        private: bool = False,
        extra_args: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if private and profile == "full":
            raise ClusterError(
                "there is one full cluster per machine, since it owns the pod bridge; private is refused"
            )
        self.profile = profile
        self.private = private
        self.extra_args = dict(extra_args or {})
        self.folder = state_dir(f"{profile}-{os.getpid()}" if private else profile)
        self.table = ProcessTable(self.folder)
        self._node = Node(self.folder, self.extra_args) if profile == "full" else None
        self._second = SecondNode(self.folder)
        self._was_up = False

    # -- what a test uses -------------------------------------------------------------------------------------------

    @property
    def kubeconfig(self) -> Path:
        """Admin kubeconfig with everything embedded."""
        return self.folder / "kubeconfig"

    @property
    def kubectl(self) -> Kubectl:
        """kubectl as cluster admin."""
        return Kubectl(tools.binary_path("kubectl"), self.kubeconfig, self.folder / "kubectl-cache")

    @property
    def nodes(self) -> kwok.FakeNodes:
        """Fake nodes; `start_kwok()` first."""
        return kwok.FakeNodes(self.kubectl)

    @property
    def logs(self) -> Path:
        """Folder with one log per component; gone after `down()`."""
        return self.table.logs

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig that acts as the user with a client certificate; give it rights by RBAC."""
        return self._control_plane().kubeconfig_for(user, groups)

    @property
    def node_name(self) -> str:
        """The name of the real node (full profile only)."""
        return NODE_NAME

    def load_image(self, tag: str) -> None:
        """The image is on the node under this tag; only layers that are not there yet are moved (full profile only)."""
        if self._node is None:
            raise ClusterError("the control-plane profile runs no containers; use the full profile")
        image_loading.load(tag, self._node.runtime)

    @contextmanager
    def second_node(self, image_tags: Sequence[str]) -> Iterator[str]:
        """A second real node with these images while the block runs; yields its name (full profile only).

        `stop_component("kubelet-1")` makes it a lost node, whose containers run on.
        """
        node, table = self._second, self.table
        if self._node is None:
            raise ClusterError("the control-plane profile runs no containers; use the full profile")
        try:
            node.start(table, self._node.network, self._control_plane(), tools.binary_path, self.kubectl)
            for tag in image_tags:
                image_loading.load(tag, node.runtime)
            yield second_node.NODE_NAME
        finally:
            node.stop(table)  # first: a kubelet that runs brings its node back
            self.kubectl("delete", "node", second_node.NODE_NAME, "--ignore-not-found")
            node.clean()

    @contextmanager
    def port_forward(self, namespace: str, target: str, port: int) -> Iterator[int]:
        """A loopback port that leads to `pod/NAME` or `service/NAME` while the block runs (full profile only)."""
        with port_forward(self.kubectl, self.table, namespace, target, port) as local:
            yield local

    def start_kwok(
        self,
        stage_files: Sequence[Path] = kwok.STAGE_FILES,
        pod_cidr: str = kwok.POD_CIDR,
        extra: Sequence[str] = (),
    ) -> None:
        """Fake nodes and pods live from now on; see `kwok/pod.yaml` for how a test steers them."""
        binary = tools.ensure([kwok.NAME])[kwok.NAME]
        port = self._kwok_port()
        self._start(kwok.component(binary, self.kubeconfig, stage_files, pod_cidr, port, extra))

    def stop_component(self, name: str, grace_seconds: float = 3.0) -> None:
        """The process is gone until `start_component`: SIGTERM, then SIGKILL after the grace (0: at once)."""
        self._known(name)
        self.table.stop(name, grace_seconds)

    def start_component(self, name: str) -> None:
        """Starts a component again with the flags it had, and waits until it is ready."""
        component = self._known(name)
        self._start(component)
        plane = self._control_plane()
        if name in controlplane.COMPONENTS:
            self.table.wait_ready(name, lambda: plane.ready(name))
        elif node := self._node_of(name):
            self.table.wait_ready(name, lambda: node.ready(name))

    def components(self) -> list[str]:
        """Names that `stop_component` and `start_component` take now."""
        return [*self._all_components(), *([kwok.NAME] if self._kwok() else [])]

    # -- life -------------------------------------------------------------------------------------------------------

    def up(self) -> LocalCluster:
        """Returns a ready cluster: starts what is missing, repairs what is half made, else does nothing."""
        names = tools.CONTROL_PLANE_TOOLS if self.profile == "control-plane" else tools.FULL_TOOLS
        tools.ensure(names)
        with self._lock():
            if self._stale():
                self._clear()
            try:
                self._converge()
            except (RuntimeError, OSError) as error:
                tools.say(f"cluster {self.folder.name}: {error}\n  removed and started once more")
                self._clear()
                self._converge()
        return self

    def down(self) -> None:
        """Nothing is left: no process, mount, interface, network namespace, firewall rule or state; caches stay."""
        with self._lock():
            self._clear()
        if self.private:
            self._lock_path().unlink(missing_ok=True)

    def status(self) -> dict[str, str]:
        """Component -> `running (pid n)` or `stopped`; empty when there is no cluster."""
        found = {}
        for name in self.table.names():
            pid = self.table.pid(name)
            found[name] = f"running (pid {pid})" if pid else "stopped"
        return found

    def ready(self) -> bool:
        """Whether every component of the profile runs and the API server says that it is ready."""
        names = self.table.names()
        if not names or any(self.table.pid(name) is None for name in self._expected()):
            return False
        return "ok" in self.kubectl("get", "--raw", "/readyz", check=False, timeout=10)

    def __enter__(self) -> LocalCluster:
        self._was_up = self.ready()
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._was_up:
            self.down()

    # -- how ----------------------------------------------------------------------------------------------------------

    def _converge(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "boot").write_text(boot_id())
        if any(self.table.pid(name) is None for name in self._expected()):
            # Not on a whole cluster: the shims of its pods carry the mark too.
            self.table.stop_strays()
        if self._node:
            self._node.prepare()
        plane = self._control_plane()
        plane.start(self.table, self.private)
        self._wait("service account kube-system/default", self._has_service_account)
        if self._node:
            self._node.start(self.table, plane, tools.binary_path, self.kubectl)

    def _node_of(self, component: str) -> Node | SecondNode | None:
        return next((node for node in (self._node, self._second) if node and component in node.COMPONENTS), None)

    def _clear(self) -> None:
        self._second.stop(self.table)
        for name in (*STOP_ORDER, *self.table.names()):
            if name == "containerd" and self._node:
                self._node.remove_pods(self.table)
            self.table.stop(name)
        self.table.stop_strays()
        self._second.clean()
        if self._node:
            self._node.clean(self.table)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _control_plane(self) -> ControlPlane:
        address = self._node.address if self._node else controlplane.LOOPBACK
        ports = choose_ports(self.folder / "ports.json", address, self.table)
        authority = Authority(self.folder / "pki")
        binaries = {name: tools.binary_path(name) for name in controlplane.COMPONENTS}
        return ControlPlane(self.folder, address, authority, ports, binaries, self.extra_args)

    def _all_components(self) -> dict[str, Component]:
        plane = self._control_plane()
        of_nodes = self._node.components(plane, tools.binary_path) if self._node else {}
        if self._node and self._second.exists:
            of_nodes |= self._second.components(self._node.network, plane, tools.binary_path)
        return {**plane.components(), **of_nodes}

    def _expected(self) -> list[str]:
        return [*controlplane.COMPONENTS, *(self._node.COMPONENTS if self._node else ())]

    def _known(self, name: str) -> Component:
        kwok_component = self._kwok()
        if name == kwok.NAME and kwok_component:
            return kwok_component
        known = self._all_components()
        if name not in known:
            raise ClusterError(f"no component {name!r}; there are: {', '.join(known)}")
        return known[name]

    def _kwok(self) -> Component | None:
        try:
            return Component(kwok.NAME, (self.folder / "kwok.argv").read_text().split("\0"))
        except OSError:
            return None

    def _kwok_port(self) -> int:
        """The port that a running KWOK has, so that a second start finds the same command line; else a free one."""
        running = self._kwok() if self.table.pid(kwok.NAME) else None
        return kwok.port(running.argv) if running else free_port()

    def _start(self, component: Component) -> None:
        if component.name == kwok.NAME:
            (self.folder / "kwok.argv").write_text("\0".join(component.argv))
            self.table.start(Component(component.name, component.argv, component.env, self.private))
            self.table.wait_ready(kwok.NAME, lambda: kwok.ready(component.argv), 30)
            return
        self.table.start(Component(component.name, component.argv, component.env, self.private))

    def _stale(self) -> bool:
        """Whether the state is from before a reboot: etcd runs without fsync, so its data is not trusted then."""
        try:
            return (self.folder / "boot").read_text() != boot_id()
        except OSError:
            return False

    def _has_service_account(self) -> bool:
        account = self.kubectl("get", "serviceaccount", "default", "-n", "kube-system", "-o", "name", check=False)
        return account.strip() == "serviceaccount/default"

    def _wait(self, what: str, probe: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not probe():
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}: not there after {seconds:.0f} s; logs are in {self.logs}")
            time.sleep(0.2)

    def _lock_path(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self._lock_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
