"""The pod network of the full profile: one bridge, addresses by CNI, and a record of what to put back afterwards."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BRIDGE = "ftpods0"
NAME = "finetune-pods"
CNI_NOTES = Path("/var/lib/cni/results")
ADDRESS = "10.244.0.1"
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
CNI_PLUGINS = ("bridge", "host-local", "portmap", "loopback")
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin")
# Traffic from a pod to a Service address is routed by the host; replies between pods of one bridge must meet the
# host's connection tracking again, else the client sees an answer from an address that it never asked.
SYSCTLS = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1"}
PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))


class NetworkError(RuntimeError):
    """The pod network cannot be made on this machine; the message says what is missing."""


class Network:
    """The bridge and CNI configuration of one cluster; `clean` undoes exactly what `prepare` did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "network"

    @property
    def cni_configuration(self) -> Path:
        return self.folder / "net.d"

    @property
    def cni_binaries(self) -> str:
        """The folder that holds the CNI plugins; raises NetworkError when they are not installed."""
        for folder in CNI_FOLDERS:
            if all((Path(folder) / plugin).exists() for plugin in CNI_PLUGINS):
                return folder
        raise NetworkError("CNI plugins are missing; run: hack/bootstrap.sh e2e")

    def prepare(self) -> None:
        """The bridge is up with its address and the CNI configuration is written; no change when that is so already."""
        self.cni_configuration.mkdir(parents=True, exist_ok=True)
        self._set_sysctls()
        if not bridge_exists():
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
        if ADDRESS not in _run("ip", "-4", "-o", "address", "show", "dev", BRIDGE):
            _run("ip", "address", "add", f"{ADDRESS}/{POD_CIDR.split('/')[1]}", "dev", BRIDGE)
        # A bridge without ports has no carrier, and an address without carrier cannot be bound by some servers.
        _run("ip", "link", "set", BRIDGE, "up")
        # Without a route the host cannot even begin to send to a Service, and many offline machines have no default one.
        _run("ip", "route", "replace", SERVICE_CIDR, "dev", BRIDGE)
        (self.cni_configuration / "10-pods.conflist").write_text(json.dumps(self._cni(), indent=1))

    def clean(self) -> None:
        """No bridge, firewall table or changed kernel setting of ours is left."""
        for family, table in PROXY_TABLES:
            if shutil.which("nft"):
                subprocess.run(["nft", "delete", "table", family, table], capture_output=True, check=False)
        if shutil.which("ip") and bridge_exists():
            _run("ip", "link", "delete", BRIDGE)
        # The CNI library keeps a note per pod, which stays when a pod ends without its network plugin being asked.
        for note in CNI_NOTES.glob(f"{NAME}-*"):
            note.unlink()
        self._restore_sysctls()

    def _cni(self) -> dict[str, object]:
        ranges = [[{"subnet": POD_CIDR, "rangeStart": "10.244.0.10", "gateway": ADDRESS}]]
        addresses = {"type": "host-local", "dataDir": str(self.folder / "ipam"), "ranges": ranges}
        bridge = {
            **{"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": False, "hairpinMode": True},
            "ipam": {**addresses, "routes": [{"dst": "0.0.0.0/0"}]},
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.4.0", "name": NAME, "plugins": [bridge, portmap]}

    def _set_sysctls(self) -> None:
        record = self.folder / "sysctls.json"
        before = json.loads(record.read_text()) if record.exists() else {}
        for key, wanted in SYSCTLS.items():
            path = Path("/proc/sys") / key
            if path.exists() and path.read_text().strip() != wanted:
                before.setdefault(key, path.read_text().strip())
                record.write_text(json.dumps(before))
                path.write_text(wanted)

    def _restore_sysctls(self) -> None:
        record = self.folder / "sysctls.json"
        if record.exists():
            for key, value in json.loads(record.read_text()).items():
                (Path("/proc/sys") / key).write_text(value)
            record.unlink()


def unmount_below(folder: Path) -> None:
    """Nothing is mounted below the folder any more; lazily where something still holds a mount."""
    prefix = str(folder)
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(prefix + "/"):
            points.append(point)
    for point in sorted(points, key=len, reverse=True):
        if subprocess.run(["umount", point], capture_output=True, check=False).returncode != 0:
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def add_address(address: str) -> None:
    """The bridge has this address too; it goes with the bridge."""
    if f" {address}/" not in _run("ip", "-4", "-o", "address", "show", "dev", BRIDGE):
        _run("ip", "address", "add", f"{address}/{POD_CIDR.split('/')[1]}", "dev", BRIDGE)


@contextmanager
def cut_off(address: str) -> Iterator[None]:
    """Nothing reaches the pod with this address, and it reaches nothing, while the block runs."""
    neighbours = json.loads(_run("ip", "-j", "neigh", "show", address, "dev", BRIDGE))
    hardware = next((found["lladdr"] for found in neighbours if "lladdr" in found), None)
    entries = json.loads(_run("bridge", "-j", "fdb", "show", "br", BRIDGE))
    port = next((entry["ifname"] for entry in entries if entry["mac"] == hardware), None)
    if port is None:
        raise NetworkError(f"no pod with address {address} is on {BRIDGE}")
    _run("ip", "link", "set", port, "down")
    try:
        yield
    finally:
        _run("ip", "link", "set", port, "up")


def bridge_exists() -> bool:
    """Whether a full cluster's bridge is on this machine."""
    return BRIDGE in {name for _, name in socket.if_nameindex()}


def _run(*command: str) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
