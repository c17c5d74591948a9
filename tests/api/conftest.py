"""The api tier: a real API server, etcd, scheduler and controller manager; nodes and pods are KWOK's."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.job import GROUP
from tests.api import objects
from tests.api.fake_trainer import FakeTrainers
from tests.api.history import History
from tests.api.operator_process import OperatorProcess
from tests.api.rest import Api
from tests.api.tenant import Tenant, is_true, until
from tests.cluster import tools
from tests.cluster.local import LocalCluster

REPO = Path(__file__).parents[2]
CRDS = REPO / "crds"
CHART = REPO / "charts" / "finetune-operator"
NAMESPACE = "finetune-system"
RELEASE = "finetune"
# name and accelerator, GiB, US dollars per GPU and hour
POOLS = (("l4", 24, 0.7), ("a40", 48, 1.1), ("a100-40", 40, 2.0), ("a100-80", 80, 3.0))
# By default the controllers ask 20 times a second, which a hundred jobs use up for minutes.
UNTHROTTLED = {
    name: ["--kube-api-qps=300", "--kube-api-burst=600"] for name in ("kube-controller-manager", "kube-scheduler")
}
_COUNTER = itertools.count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests measured, also where their output is captured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """A control plane of this test process, with our CRDs and fake pods."""
    with LocalCluster("control-plane", private=True, extra_args=UNTHROTTLED) as found:
        # Pods of two test processes on one machine must not share addresses.
        found.start_kwok(pod_cidr=f"127.{64 + os.getpid() % 64}.0.1/16")
        found.kubectl("apply", "--server-side", *(f"--filename={path}" for path in sorted(CRDS.glob("*.yaml"))))
        # Discovery learns of a kind a moment after it is established; kubectl keeps what it was told.
        until(
            lambda: found.kubectl("api-resources", f"--api-group={GROUP}", "--output=name", check=False),
            lambda served: {f"finetunejobs.{GROUP}", f"gpupools.{GROUP}"} <= set(served.split()),
        )
        yield found


@pytest.fixture(scope="session")
def api(cluster: LocalCluster) -> Api:
    """Requests as cluster admin, once our kinds are served."""
    found = Api(cluster.kubeconfig)
    crds = "customresourcedefinitions"
    until(
        lambda: [is_true("Established")(crd.get("status", {})) for crd in found.list(crds)],
        lambda served: served == [True, True],
    )
    return found


@pytest.fixture
def namespace(api: Api, request: pytest.FixtureRequest) -> str:
    """A namespace of this test alone."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.originalname.removeprefix("test_").lower())[:40].strip("-")
    name = f"{words}-{os.getpid()}-{next(_COUNTER)}"
    api.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture(scope="session")
def pools(cluster: LocalCluster, api: Api) -> tuple[str, ...]:
    """The platform team's pools, each with two whole nodes that carry its label and the GPU taint; one plain node."""
    cluster.nodes.add("plain-0", gpus=0)
    for name, memory, price in POOLS:
        api.create("gpupools", objects.pool(name, name, memory, price))
        for number in range(2):
            cluster.nodes.add(f"{name}-{number}", gpus=8, labels={"gpu-pool": name}, taints=[objects.GPU_TAINT])
    return tuple(name for name, *_ in POOLS)


@pytest.fixture(scope="session")
def history(api: Api) -> Iterator[History]:
    """Every version of every job from before the operator's start."""
    found = History(api)
    yield found
    found.close()


@pytest.fixture(scope="session")
def operator_process(cluster: LocalCluster) -> Iterator[OperatorProcess]:
    """The one operator of the cluster, which runs while tests want it, as the chart's service account."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
    found = OperatorProcess(cluster, cluster.kubeconfig_for(f"system:serviceaccount:{NAMESPACE}:{RELEASE}", groups))
    yield found
    found.stop()


@pytest.fixture(scope="session")
def installed(cluster: LocalCluster, api: Api) -> None:
    """The chart's service account with the chart's rights, and the namespace of the Lease."""
    api.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    helm = tools.ensure(["helm"])["helm"]
    shown = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac")]
    command = [str(helm), "template", RELEASE, str(CHART), f"--namespace={NAMESPACE}", *shown]
    manifests = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cluster.kubectl("apply", "--server-side", "-f", "-", input=manifests)


@pytest.fixture
def operator(
    operator_process: OperatorProcess, installed: None, pools: tuple[str, ...], history: History
) -> OperatorProcess:
    """The operator as a process; a test may stop and start it."""
    if operator_process.pid is None:
        operator_process.start()
    return operator_process


@pytest.fixture
def without_operator(operator_process: OperatorProcess) -> None:
    """Nobody but the test writes status."""
    operator_process.stop()


@pytest.fixture(scope="session")
def trainers() -> Iterator[FakeTrainers]:
    """The progress servers of the fake pods."""
    with FakeTrainers() as found:
        yield found


@pytest.fixture
def tenant(
    api: Api, trainers: FakeTrainers, namespace: str, operator: OperatorProcess, history: History
) -> Iterator[Tenant]:
    """A tenant with a namespace of her own. Afterwards nothing of hers holds GPUs, and these hold for every test:

    no Kopf annotation and no finalizer was ever on her jobs, and no two writes in a row said the same.
    """
    found = Tenant(api, trainers, namespace)
    yield found
    # The children too: the garbage collector learns of new kinds only every 30 s, and is slow with a hundred jobs.
    for plural in ("finetunejobs", "jobs", "pods"):
        api.delete_all(plural, namespace)
    until(lambda: api.list("pods", namespace), lambda pods: not pods)
    assert operator.pid, f"the operator ended by itself:\n{operator.log[-4000:]}"
    assert history.touched_metadata(namespace) == []
    assert history.repetitions(namespace) == []
