"""containerd of our own: own root (the image store, kept as a cache), own state and own socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster.network import Network, unmount_below
from tests.cluster.paths import cache_root, write_if_changed
from tests.cluster.processes import Component, ProcessTable

NAME = "containerd"
NAMESPACE = "k8s.io"
# Path limit of a unix socket, less the suffix that containerd adds.
SOCKET_PATH_LIMIT = 100


class ContainerRuntimeError(RuntimeError):
    """containerd cannot run here or refused something; the message says what."""


class ContainerRuntime:
    """One containerd; its image store (root, default: in the cache) outlives the cluster, all else goes with it."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder = folder
        self.root = root or cache_root() / "containerd"
        self.state = folder / "containerd"
        self.socket = folder / "containerd.sock"
        self.cgroup = cgroup_name(folder)

    def component(self, network: Network, pause_image: str) -> Component:
        """Writes the configuration and returns the process."""
        for program in ("containerd", "containerd-shim-runc-v2", "runc", "ctr"):
            if shutil.which(program) is None:
                raise ContainerRuntimeError(f"{program} is not installed; run: hack/bootstrap.sh e2e")
        if len(str(self.socket)) > SOCKET_PATH_LIMIT:
            raise ContainerRuntimeError(f"path too long for a socket: {self.socket}; set a shorter FINETUNE_CACHE")
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.folder / "containerd.toml"
        write_if_changed(path, self._configuration(network, pause_image))
        return Component(NAME, [shutil.which("containerd") or NAME, "--config", str(path)])

    def ready(self) -> bool:
        """Whether containerd answers on its socket."""
        return self.socket.exists() and self._ctr("version", check=False).returncode == 0

    def ctr(self, *arguments: str) -> str:
        """Runs `ctr` in the kubelet's namespace and returns stdout; raises ContainerRuntimeError when it fails."""
        return self._ctr(*arguments, check=True).stdout

    def remove_containers(self) -> None:
        """No container or sandbox is left, running or not; images stay."""
        ids = self.ctr("containers", "list", "--quiet").split()
        if not ids:
            return
        tasks = self.ctr("tasks", "list", "--quiet").split()
        if tasks:
            self._ctr("tasks", "delete", "--force", *tasks, check=False)
        self._ctr("containers", "delete", *ids, check=False)

    def clean(self, table: ProcessTable) -> None:
        """No process in our control group, no shim, no mount and no control group is left, whatever the state was."""
        kill_cgroup(self.cgroup)
        table.stop_strays()
        unmount_below(self.folder)
        remove_cgroup(self.cgroup)

    def _ctr(self, *arguments: str, check: bool) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", str(self.socket), "--namespace", NAMESPACE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if check and done.returncode != 0:
            raise ContainerRuntimeError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def _configuration(self, network: Network, pause_image: str) -> str:
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        # restrict_oom_score_adj: without CAP_SYS_RESOURCE every sandbox fails with "can't get final child's PID".
        return f"""\
version = 2
root = "{self.root}"
state = "{self.state}"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.tracing.processor.v1.otlp"]

[grpc]
  address = "{self.socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{self.folder / "opt"}"

[{cri}]
  sandbox_image = "{pause_image}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [{cri}.containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [{cri}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [{cri}.containerd.runtimes.runc.options]
        Root = "{self.folder / "runc"}"
  [{cri}.cni]
    bin_dir = "{network.cni_binaries}"
    conf_dir = "{network.cni_configuration}"
"""


def cgroup_name(folder: Path) -> str:
    """The control group of the cluster in this state folder: every container in it is provably ours."""
    return f"finetune-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def cgroup_folders(name: str) -> list[Path]:
    """The control group in every mounted hierarchy (several with cgroup v1, one with v2), existing or not."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] in ("cgroup", "cgroup2"):
            found.append(Path(fields[4]) / name)
    return found


def make_cgroup(name: str) -> None:
    """The control group exists with all controllers."""
    for folder in cgroup_folders(name):
        folder.mkdir(exist_ok=True)
        parent = folder.parent
        # A new v1 cpuset is empty and accepts no process until it is filled.
        for setting in ("cpuset.mems", "cpuset.cpus"):
            own, above = folder / setting, parent / setting
            if own.exists() and not own.read_text().strip() and above.exists():
                own.write_text(above.read_text())
        controllers = parent / "cgroup.controllers"
        if controllers.exists() and controllers.read_text().strip():
            wanted = " ".join(f"+{controller}" for controller in controllers.read_text().split())
            (parent / "cgroup.subtree_control").write_text(wanted)


def kill_cgroup(name: str, timeout_seconds: float = 10.0) -> None:
    """No process is left in the control group."""
    deadline = time.monotonic() + timeout_seconds
    while pids := _cgroup_pids(name):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ContainerRuntimeError(f"processes {sorted(pids)} in control group {name} survive SIGKILL")
        time.sleep(0.1)


def remove_cgroup(name: str) -> None:
    """The control group is gone from every hierarchy."""
    for folder in cgroup_folders(name):
        if folder.exists():
            for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
                below.rmdir()
            folder.rmdir()


def _cgroup_pids(name: str) -> set[int]:
    pids: set[int] = set()
    for folder in cgroup_folders(name):
        for procs in folder.rglob("cgroup.procs") if folder.exists() else ():
            try:
                pids.update(int(line) for line in procs.read_text().split())
            except OSError:
                continue
    return pids
