"""The full profile on kind, where a Docker engine answers.

Same entry points as `LocalCluster`, so that one test suite runs on both. Not run on the machines this was written on,
which have no Docker engine: treat its first run as part of the test.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tests.cluster import images, tools
from tests.cluster.certs_by_api import kubeconfig_by_request
from tests.cluster.kubectl import Kubectl
from tests.cluster.paths import PACKAGE, state_dir
from tests.cluster.port_forward import port_forward
from tests.cluster.processes import ProcessTable

NAME = "finetune-test"
NODE_UNITS = ("kubelet", "containerd")


class KindError(RuntimeError):
    """kind or Docker refused; the message carries their words."""


class KindCluster:
    """A kind cluster named `finetune-test`; `up()` and `down()` may be called at any time, in any state."""

    profile = "full"
    node_name = f"{NAME}-control-plane"

    def __init__(self) -> None:
        self.folder = state_dir("kind")
        self.table = ProcessTable(self.folder)
        self._was_up = False

    @property
    def kubeconfig(self) -> Path:
        """Admin kubeconfig with everything embedded."""
        return self.folder / "kubeconfig"

    @property
    def kubectl(self) -> Kubectl:
        """kubectl as cluster admin; the machine's own where there is one, since ours takes minutes to build."""
        found = shutil.which("kubectl")
        binary = Path(found) if found else tools.ensure(["kubectl"])["kubectl"]
        return Kubectl(binary, self.kubeconfig, self.folder / "kubectl-cache")

    @property
    def logs(self) -> Path:
        """Folder with the node's logs, collected now."""
        folder = self.folder / "logs"
        self._kind("export", "logs", str(folder), "--name", NAME, check=False)
        return folder

    def up(self) -> KindCluster:
        """Returns a ready cluster; a half-made one is deleted first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._exists() and not self.ready():
            self._kind("delete", "cluster", "--name", NAME)
        if not self._exists():
            configuration = str(PACKAGE / "kind.yaml")
            where = ["--kubeconfig", str(self.kubeconfig), "--config", configuration]
            self._kind("create", "cluster", "--name", NAME, "--wait", "180s", *where)
        self._kind("export", "kubeconfig", "--name", NAME, "--kubeconfig", str(self.kubeconfig))
        self.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
        self.kubectl("rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=120s")
        return self

    def down(self) -> None:
        """The cluster and its containers are gone; Docker's images stay."""
        for name in self.table.names():
            self.table.stop(name)
        self._kind("delete", "cluster", "--name", NAME)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ready(self) -> bool:
        """Whether the API server says that it is ready."""
        return self.kubeconfig.exists() and "ok" in self.kubectl("get", "--raw", "/readyz", check=False, timeout=10)

    def status(self) -> dict[str, str]:
        """The node's container -> its state; empty when there is no cluster."""
        if not self._exists():
            return {}
        state = self._docker("inspect", "--format", "{{.State.Status}}", self.node_name).strip()
        return {self.node_name: state}

    def load_image(self, tag: str) -> None:
        """The image is on the node under this tag."""
        self._kind("load", "docker-image", tag, "--name", NAME)

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig that acts as the user with a client certificate; give it rights by RBAC."""
        return kubeconfig_by_request(self.kubectl, self.folder / "kubeconfigs", user, groups)

    @contextmanager
    def port_forward(self, namespace: str, target: str, port: int) -> Iterator[int]:
        """A loopback port that leads to the pod or Service while the block runs."""
        with port_forward(self.kubectl, self.table, namespace, target, port) as local:
            yield local

    def components(self) -> list[str]:
        """Names that `stop_component` and `start_component` take."""
        return list(NODE_UNITS)

    def stop_component(self, name: str, grace_seconds: float = 3.0) -> None:
        """Stops a unit of the node until `start_component`; kind runs the control plane as pods, which stay."""
        self._unit("stop", name)

    def start_component(self, name: str) -> None:
        """Starts the unit again."""
        self._unit("start", name)

    def __enter__(self) -> KindCluster:
        self._was_up = self._exists() and self.ready()
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._was_up:
            self.down()

    def _unit(self, verb: str, name: str) -> None:
        if name not in NODE_UNITS:
            raise KindError(f"kind can {verb} only {', '.join(NODE_UNITS)}, not {name}")
        self._docker("exec", self.node_name, "systemctl", verb, name)

    def _exists(self) -> bool:
        return NAME in self._kind("get", "clusters").split()

    def _kind(self, *arguments: str, check: bool = True) -> str:
        found = shutil.which("kind")
        return _run([found or str(tools.ensure(["kind"])["kind"]), *arguments], check)

    def _docker(self, *arguments: str) -> str:
        return _run(["docker", *arguments], True)


def answers() -> bool:
    """Whether kind can work here: a Docker engine answers."""
    return images.docker_answers()


def _run(command: Sequence[str], check: bool) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=900, check=False)
    if check and done.returncode != 0:
        raise KindError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
