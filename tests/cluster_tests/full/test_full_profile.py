"""The full profile runs real pods, survives a kill at any point, and leaves the machine as it found it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3

from tests.cluster import images
from tests.cluster.base_image import ensure_base
from tests.cluster.container_runtime import ContainerRuntime, cgroup_folders, cgroup_name
from tests.cluster.image_loading import load
from tests.cluster.local import LocalCluster
from tests.cluster.node import FIXED_FOLDERS
from tests.cluster.paths import REPO
from tests.cluster.processes import marked_pids
from tests.cluster.s3_pod import s3_pod

# Finds its peer by the headless Service, then waits for it; names can take a moment to appear.
GANG = """
import os, socket, time
index = int(os.environ["JOB_COMPLETION_INDEX"])
server = socket.create_server(("0.0.0.0", 9000))
for attempt in range(100):
    try:
        socket.create_connection((f"gang-{1 - index}.gang", 9000), 5).close()
        break
    except OSError:
        time.sleep(0.3)
server.accept()
print("api", socket.gethostbyname("kubernetes.default"), "peer met", flush=True)
open("/dev/termination-log", "w").write(f"rank {index}")
"""


def traces(cluster: LocalCluster) -> dict[str, Any]:
    """Everything on the machine that a cluster could leave behind."""
    nft = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    links = sorted(name for _, name in socket.if_nameindex())
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {
        "links": links,
        "rules": nft,
        "mounts": sorted(point for point in mounts if "finetune" in point or "kubelet" in point or "netns" in point),
        "namespaces": namespaces,
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        "processes": marked_pids(cluster.folder),
        "cgroups": [
            str(path)
            for folder in (cluster.folder, cluster.folder / "node-1")
            for path in cgroup_folders(cgroup_name(folder))
            if path.exists()
        ],
        "folders": {str(path): sorted(os.listdir(path)) if path.exists() else None for path in FIXED_FOLDERS},
        "state": cluster.folder.exists(),
    }


def restricted_pod(image: str, command: list[str]) -> dict[str, Any]:
    container = {
        **{"name": "main", "image": image, "command": command},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        **{"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "subdomain": "gang"},
        **{"securityContext": security, "containers": [container]},
    }


def start_idle_pod(cluster: LocalCluster) -> None:
    """A pod `idle` that runs and does nothing."""
    base = ensure_base()
    cluster.load_image(base)
    cluster.kubectl("run", "idle", f"--image={base}", "--image-pull-policy=Never", "--", "sleep", "300")
    cluster.kubectl("wait", "pod/idle", "--for=condition=Ready", "--timeout=60s")


def running_containers(folder: Path) -> set[str]:
    """Name, process and state of each container of the node in this folder."""
    return set(ContainerRuntime(folder).ctr("tasks", "list").splitlines()[1:])


def test_pods_meet_by_name_and_nothing_stays_behind(cluster: LocalCluster) -> None:
    before = traces(cluster)
    cluster.up()
    base = ensure_base()
    cluster.load_image(base)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    template = {"spec": restricted_pod(base, ["python3", "-c", GANG])}
    spec = {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 0, "template": template}
    cluster.kubectl.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team", "labels": labels}},
        {
            **{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "gang", "namespace": "team"}},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "gang"}},
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "gang", "namespace": "team"}, "spec": spec},
    )
    cluster.kubectl("wait", "-n", "team", "job/gang", "--for=condition=Complete", "--timeout=90s")
    pods = cluster.kubectl.json("get", "pods", "-n", "team")["items"]
    ends = [pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] for pod in pods]
    assert sorted(ends) == ["rank 0", "rank 1"]
    for pod in pods:
        said = cluster.kubectl("logs", "-n", "team", pod["metadata"]["name"])
        assert said == "api 10.96.0.1 peer met\n"
    # A pod that still runs must not keep anything alive either.
    cluster.kubectl("run", "idle", f"--image={base}", "--image-pull-policy=Never", "--", "sleep", "300")
    cluster.kubectl("wait", "pod/idle", "--for=condition=Ready", "--timeout=60s")
    assert "uid=0" in cluster.kubectl("exec", "idle", "--", "id")
    cluster.down()
    assert traces(cluster) == before


def test_a_second_up_changes_nothing_and_down_twice_is_no_error(cluster: LocalCluster) -> None:
    cluster.up()
    start_idle_pod(cluster)
    before, containers = cluster.status(), running_containers(cluster.folder)
    cluster.up()
    assert cluster.status() == before
    assert running_containers(cluster.folder) == containers
    cluster.down()
    cluster.down()
    assert cluster.status() == {}


def test_an_up_that_was_killed_midway_is_completed_by_the_next(cluster: LocalCluster) -> None:
    before = traces(cluster)
    for stage in ("etcd", "containerd", "kubelet"):
        process = subprocess.Popen([sys.executable, "-m", "tests.cluster", "up", "--cluster=local"], cwd=REPO)
        record = cluster.folder / "pids" / f"{stage}.json"
        while not record.exists():
            assert process.poll() is None, f"up ended before {stage} was started"
            time.sleep(0.01)
        process.kill()
        process.wait()
    cluster.up()
    assert cluster.ready()
    cluster.down()
    assert traces(cluster) == before


def test_down_cleans_up_after_a_crash_of_everything(cluster: LocalCluster) -> None:
    before = traces(cluster)
    cluster.up()
    base = ensure_base()
    cluster.load_image(base)
    cluster.kubectl("run", "idle", f"--image={base}", "--image-pull-policy=Never", "--", "sleep", "300")
    cluster.kubectl("wait", "pod/idle", "--for=condition=Ready", "--timeout=60s")
    for name in cluster.table.names():
        cluster.table.signal(name, signal.SIGKILL)
    cluster.down()
    assert traces(cluster) == before


def test_a_stopped_kubelet_can_be_started_again(cluster: LocalCluster) -> None:
    cluster.up()
    cluster.stop_component("kubelet")
    assert cluster.table.pid("kubelet") is None
    assert not cluster.ready()
    cluster.start_component("kubelet")
    assert cluster.ready()


def test_pods_of_a_second_node_run_on_while_its_kubelet_is_stopped(cluster: LocalCluster) -> None:
    before = traces(cluster)
    cluster.up()
    with cluster.second_node([ensure_base()]) as name:
        cluster.kubectl("cordon", cluster.node_name)
        start_idle_pod(cluster)
        assert cluster.kubectl.json("get", "pod", "idle")["spec"]["nodeName"] == name
        containers = running_containers(cluster.folder / name)
        cluster.stop_component("kubelet-1")
        assert running_containers(cluster.folder / name) == containers
        cluster.start_component("kubelet-1")
        assert running_containers(cluster.folder / name) == containers
    assert "node-1" not in cluster.kubectl("get", "nodes")
    cluster.down()
    assert traces(cluster) == before


def test_only_changed_layers_are_moved(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.up()
    runtime = ContainerRuntime(cluster.folder)
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG BASE=debian:trixie-slim\nFROM ${BASE}\nRUN head -c 5000000 /dev/urandom > /big\nCOPY code /code\n"
    )
    (tmp_path / "code").write_text("one")
    first = images.build(dockerfile, tmp_path, "finetune-layers")
    assert load(first, runtime) > 5_000_000
    assert load(first, runtime) == 0
    (tmp_path / "code").write_text("two")
    second = images.build(dockerfile, tmp_path, "finetune-layers")
    assert second != first
    assert 0 < load(second, runtime) < 100_000
    cluster.kubectl(
        "run", "reader", f"--image={second}", "--image-pull-policy=Never", "--restart=Never", "--", "cat", "/code"
    )
    cluster.kubectl("wait", "pod/reader", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    assert cluster.kubectl("logs", "reader") == "two"
    images.run(images.buildah("rmi", second))


def test_the_s3_pod_serves_pods_and_the_test(cluster: LocalCluster) -> None:
    cluster.up()
    cluster.kubectl("create", "namespace", "store")
    cluster.kubectl("label", "namespace", "store", "pod-security.kubernetes.io/enforce=restricted")
    with s3_pod(cluster, "store") as s3:
        s3.add_user("team")
        s3.create_bucket("team", owner="team")
        client = boto3.client("s3", **s3.client_options("team"))
        client.put_object(Bucket="team", Key="k", Body=b"x" * 1000)
        assert client.head_object(Bucket="team", Key="k")["ContentLength"] == 1000
        base = ensure_base()
        cluster.load_image(base)
        ask = f"import urllib.request; print(urllib.request.urlopen('{s3.internal_endpoint}/healthz').status)"
        run = ["run", "asker", f"--image={base}", "--image-pull-policy=Never", "--restart=Never"]
        cluster.kubectl(*run, "--", "python3", "-c", ask)
        cluster.kubectl("wait", "pod/asker", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
        assert cluster.kubectl("logs", "asker").strip() == "200"


def test_a_privileged_pod_is_refused_in_a_restricted_namespace(cluster: LocalCluster) -> None:
    cluster.up()
    cluster.kubectl("create", "namespace", "strict")
    cluster.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    refused = cluster.kubectl("run", "bad", "-n", "strict", "--image=x", "--privileged", check=False)
    assert 'violates PodSecurity "restricted' in refused
