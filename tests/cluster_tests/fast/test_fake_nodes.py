"""Fake GPU nodes: the scheduler decides for real, pods do what the test says."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.local import LocalCluster

_NUMBERS = itertools.count()
Pods = Callable[[], dict[str, dict[str, Any]]]


@pytest.fixture
def namespace(cluster: LocalCluster) -> Iterator[str]:
    name = f"fake-{next(_NUMBERS)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def node(cluster: LocalCluster) -> Iterator[str]:
    name = f"gpu-{next(_NUMBERS)}"
    cluster.nodes.add(name, gpus=8, labels={"pool": name})
    yield name
    cluster.nodes.remove(name)


def job(name: str, node: str, gpus: int = 8) -> dict[str, Any]:
    container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    pod = {"restartPolicy": "Never", "nodeSelector": {"pool": node}, "containers": [container]}
    spec = {"backoffLimit": 0, "template": {"metadata": {"labels": {"app": name}}, "spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def pod_of(cluster: LocalCluster, namespace: str, name: str) -> dict[str, Any] | None:
    items = cluster.kubectl.json("get", "pods", "-n", namespace, "-l", f"app={name}")["items"]
    return dict(items[0]) if items else None


def wait(cluster: LocalCluster, namespace: str, name: str, good: Callable[[Any], bool], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not good(found := pod_of(cluster, namespace, name)):
        assert time.monotonic() < deadline, f"{name}: {found and found['status']}"
        time.sleep(0.1)
    return found


def phase(wanted: str) -> Callable[[Any], bool]:
    return lambda pod: pod is not None and pod["status"].get("phase") == wanted


def name_of(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def test_two_eight_gpu_pods_run_one_after_the_other(cluster: LocalCluster, namespace: str, node: str) -> None:
    cluster.kubectl.apply(job("first", node), namespace=namespace)
    first = wait(cluster, namespace, "first", phase("Running"))
    cluster.kubectl.apply(job("second", node), namespace=namespace)
    unschedulable = wait(cluster, namespace, "second", lambda pod: pod and pod["status"].get("conditions"))
    assert unschedulable["status"]["conditions"][0]["reason"] == "Unschedulable"
    cluster.nodes.finish(namespace, name_of(first), message='{"artifact": "s3://a"}')
    wait(cluster, namespace, "second", phase("Running"))
    cluster.kubectl("wait", "-n", namespace, "job/first", "--for=condition=Complete", "--timeout=20s")
    ended = wait(cluster, namespace, "first", phase("Succeeded"))["status"]["containerStatuses"][0]["state"][
        "terminated"
    ]
    assert (ended["exitCode"], ended["message"]) == (0, '{"artifact": "s3://a"}')


def test_an_exit_code_fails_the_job(cluster: LocalCluster, namespace: str, node: str) -> None:
    cluster.kubectl.apply(job("oom", node), namespace=namespace)
    pod = wait(cluster, namespace, "oom", phase("Running"))
    cluster.nodes.finish(namespace, name_of(pod), exit_code=137, reason="OOMKilled")
    cluster.kubectl("wait", "-n", namespace, "job/oom", "--for=condition=Failed", "--timeout=20s")
    ended = pod_of(cluster, namespace, "oom")
    assert ended is not None
    state = ended["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["reason"]) == (137, "OOMKilled")


def test_a_running_pod_has_an_address_that_a_test_can_serve_on(
    cluster: LocalCluster, namespace: str, node: str
) -> None:
    cluster.kubectl.apply(job("agent", node), namespace=namespace)
    pod = wait(cluster, namespace, "agent", phase("Running"))
    assert {"type": "Ready", "status": "True"}.items() <= _condition(pod, "Ready").items()
    with socket.create_server((pod["status"]["podIP"], 0)) as server:
        socket.create_connection(server.getsockname(), 2).close()


def test_a_deleted_job_takes_its_pod_with_it(cluster: LocalCluster, namespace: str, node: str) -> None:
    cluster.kubectl.apply(job("short", node), namespace=namespace)
    wait(cluster, namespace, "short", phase("Running"))
    cluster.kubectl("delete", "job", "short", "-n", namespace, "--wait=false")
    wait(cluster, namespace, "short", lambda pod: pod is None)


def test_a_held_pod_stays_terminating_until_it_is_let_go(cluster: LocalCluster, namespace: str, node: str) -> None:
    cluster.kubectl.apply(job("held", node), namespace=namespace)
    pod = wait(cluster, namespace, "held", phase("Running"))
    cluster.nodes.annotate(namespace, name_of(pod), {"hold": "true"})
    cluster.kubectl("delete", "pod", name_of(pod), "-n", namespace, "--wait=false")
    time.sleep(1.5)
    held = pod_of(cluster, namespace, "held")
    assert held is not None
    assert held["metadata"]["deletionTimestamp"] and held["status"]["phase"] == "Running"
    cluster.kubectl("annotate", "pod", name_of(pod), "-n", namespace, "test.finetune.dev/hold-")
    wait(cluster, namespace, "held", lambda found: found is None or name_of(found) != name_of(pod))


def test_a_pod_on_a_stuck_node_never_starts_and_says_why(cluster: LocalCluster, namespace: str) -> None:
    stuck = f"stuck-{next(_NUMBERS)}"
    cluster.nodes.add(stuck, labels={"pool": stuck})
    cluster.kubectl.apply(job("waiting", stuck), namespace=namespace)

    def reason(pod: Any) -> str | None:
        statuses = pod["status"].get("containerStatuses") if pod else None
        return str(statuses[0]["state"]["waiting"]["reason"]) if statuses else None

    pod = wait(cluster, namespace, "waiting", lambda found: reason(found) == "ContainerCreating")
    cluster.nodes.annotate(namespace, name_of(pod), {"waiting-reason": "ImagePullBackOff"})
    assert phase("Pending")(wait(cluster, namespace, "waiting", lambda found: reason(found) == "ImagePullBackOff"))
    cluster.nodes.remove(stuck)


def test_a_lost_node_freezes_its_pods_until_it_is_back(cluster: LocalCluster, namespace: str, node: str) -> None:
    cluster.kubectl.apply(job("frozen", node), namespace=namespace)
    pod = wait(cluster, namespace, "frozen", phase("Running"))
    cluster.nodes.lose(node)
    cluster.nodes.finish(namespace, name_of(pod))
    cluster.kubectl("wait", f"node/{node}", "--for=condition=Ready=Unknown", "--timeout=5s")
    time.sleep(1.5)
    assert phase("Running")(pod_of(cluster, namespace, "frozen"))
    cluster.nodes.recover(node)
    wait(cluster, namespace, "frozen", phase("Succeeded"))


def _condition(pod: dict[str, Any], kind: str) -> dict[str, str]:
    return next(condition for condition in pod["status"]["conditions"] if condition["type"] == kind)
