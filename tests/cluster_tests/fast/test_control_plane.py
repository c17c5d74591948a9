"""The control plane starts, repairs itself and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kubectl import KubectlError
from tests.cluster.local import LocalCluster
from tests.cluster.paths import REPO, cache_root
from tests.cluster.processes import marked_pids, start_time

UP = "from tests.cluster.local import LocalCluster; LocalCluster('control-plane'{}).up(); print('up', flush=True); input()"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test alone which shares only the binaries, so that nobody's cluster is touched."""
    (tmp_path / "bin").symlink_to(cache_root() / "bin")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    yield tmp_path
    LocalCluster("control-plane").down()


def start_up(arguments: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", UP.format(arguments)]
    return subprocess.Popen(command, cwd=REPO, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def pids(cluster: LocalCluster) -> dict[str, int | None]:
    return {name: cluster.table.pid(name) for name in cluster.table.names()}


def test_a_second_up_changes_nothing(cluster: LocalCluster) -> None:
    before = pids(cluster)
    cluster.up()
    assert pids(cluster) == before
    assert cluster.ready()


def test_a_crashed_component_is_replaced_and_the_others_stay(cluster: LocalCluster) -> None:
    before = pids(cluster)
    scheduler = before.pop("kube-scheduler")
    assert scheduler is not None
    os.kill(scheduler, signal.SIGKILL)
    cluster.up()
    after = pids(cluster)
    assert after.pop("kube-scheduler") not in (None, scheduler)
    assert after == before


def test_the_api_server_can_be_stopped_and_started(cluster: LocalCluster) -> None:
    cluster.stop_component("kube-apiserver")
    with pytest.raises(KubectlError):
        cluster.kubectl("get", "nodes")
    cluster.start_component("kube-apiserver")
    assert cluster.kubectl.json("version")["serverVersion"]["gitVersion"] == "v1.36.3"


def test_pod_security_refuses_what_a_restricted_namespace_forbids(cluster: LocalCluster) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}})
    # A pod is refused for want of its service account before Pod Security is asked; a controller makes it a moment later.
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", "strict", "--timeout=60s")
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        cluster.kubectl("run", "bad", "-n", "strict", "--image=x")


def test_admission_policies_and_network_policies_are_served(cluster: LocalCluster) -> None:
    served = cluster.kubectl("api-resources", "-o", "name").split()
    assert {"validatingadmissionpolicies.admissionregistration.k8s.io", "networkpolicies.networking.k8s.io"} <= set(
        served
    )


def test_a_user_has_exactly_the_rights_given(cluster: LocalCluster) -> None:
    config = cluster.kubeconfig_for("jane", ["engineers"])
    subject = ["--group=engineers", "--clusterrole=view"]
    cluster.kubectl("create", "clusterrolebinding", "engineers", *subject)
    assert cluster.kubectl(f"--kubeconfig={config}", "auth", "can-i", "list", "pods").strip() == "yes"
    assert "no" in cluster.kubectl(f"--kubeconfig={config}", "auth", "can-i", "delete", "pods", check=False)


def test_an_up_that_was_killed_midway_is_completed_by_the_next(own_cache: Path) -> None:
    process = start_up()
    wait_for(own_cache / "cluster" / "control-plane" / "pids" / "kube-apiserver.json")
    process.kill()
    process.wait()
    cluster = LocalCluster("control-plane").up()
    assert cluster.ready()
    left = set(marked_pids(cluster.folder)) - set(pids(cluster).values())
    assert left == set()
    cluster.down()
    assert marked_pids(cluster.folder) == []
    assert not cluster.folder.exists()


def test_broken_data_of_a_half_made_cluster_is_thrown_away(own_cache: Path) -> None:
    cluster = LocalCluster("control-plane")
    wal = cluster.folder / "etcd" / "member" / "wal"
    wal.mkdir(parents=True)
    (wal / "0000000000000000-0000000000000000.wal").write_bytes(b"garbage")
    cluster.up()
    assert cluster.ready()


def test_a_private_cluster_ends_with_its_process_even_when_that_is_killed(own_cache: Path) -> None:
    process = start_up(", private=True")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    folder = own_cache / "cluster" / f"control-plane-{process.pid}"
    members = marked_pids(folder)
    assert len(members) == 4
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(start_time(pid) for pid in members) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_pids(folder) == []
