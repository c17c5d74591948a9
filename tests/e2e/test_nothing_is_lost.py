"""Pods, nodes, storage and operator fail under a run: it ends with the losses of an undisturbed one, bit by bit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from hack.stand import Stand
from tests.cluster import network
from tests.cluster.local import LocalCluster
from tests.e2e.conftest import Tenant, fresh_tenant
from tests.e2e.disturbing import Recovery, Watched, kill_operator
from tests.train.models import tiny_model

INTERVAL = 5
STEPS = 40
TOKENS = 256
# Records of nearly one sequence each: what makes a step last is arithmetic. Two epochs, so that the order of the second
# has to come back too.
RECORDS = [{"text": f"Sum {n}: " + " ".join(f"{n}+{k}={n + k}" for k in range(20))} for n in range(STEPS * 2)]
RUN_SECONDS = 600
pytestmark = pytest.mark.timeout(1800)
AWAY_SECONDS = 120
# Until the node counts as not ready (50), its pods are deleted (30), their grace is over (60) and the operator is sure
# (30), then the backoff and a start.
NODE_LOST_SECONDS = 400


@dataclass
class Study:
    """Runs of one model on one data set with one seed, in one namespace, and the losses of undisturbed ones."""

    tenant: Tenant
    _undisturbed: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)

    def start(self, name: str, steps: int, **changes: Any) -> Watched:
        """Apply a job of so many steps."""
        settings = {"maxSteps": steps, "globalBatchSize": 4, "maxSequenceLength": TOKENS, "seed": 7}
        changes = {
            "checkpoint": {"everySteps": INTERVAL},
            "tuning": {"type": "LoRA", "lora": {"dropout": 0.1}},
        } | changes
        self.tenant.apply(self.tenant.job(name, hyperparameters=settings, **changes))
        return Watched(self.tenant, name)

    def undisturbed(self, steps: int, nodes: int = 1, **changes: Any) -> dict[int, float]:
        """The losses of a run that nothing happens to; made once."""
        if (steps, nodes) not in self._undisturbed:
            run = self.start(f"undisturbed-{steps}-{nodes}", steps, **changes)
            status = self.tenant.succeeded(run.name, RUN_SECONDS)
            assert status["attempt"] == 1
            losses = run.losses()
            assert list(losses) == list(range(1, steps + 1)) and len(set(losses.values())) > steps // 2
            self._undisturbed[steps, nodes] = losses
        return self._undisturbed[steps, nodes]

    def steps_of(self, seconds: float) -> int:
        """How many steps this machine makes in so many seconds, by the undisturbed run."""
        self.undisturbed(STEPS)
        key = f"out/undisturbed-{STEPS}-1/report.json"
        report = json.loads(self.tenant.s3.get_object(Bucket=self.tenant.namespace, Key=key)["Body"].read())
        return max(STEPS, round(seconds / report["training"]["seconds"] * STEPS))

    def check(self, run: Watched, steps: int, *outcomes: str, nodes: int = 1) -> dict[str, Any]:
        """The run succeeds with the undisturbed losses, its attempts ended so, and none counts as a failure."""
        status = self.tenant.succeeded(run.name, RUN_SECONDS)
        assert run.losses() == self._undisturbed[steps, nodes]
        assert [record["outcome"] for record in status["attempts"]] == [*outcomes, "Succeeded"]
        assert status.get("failures", 0) == 0
        assert status.get("interruptions", 0) == len(outcomes)
        return status


@pytest.fixture(scope="module")
def study(running: Stand) -> Iterator[Study]:
    """A tenant whose steps take long enough to be hit."""
    model = tiny_model("llama", width=128, layers=2, positions=TOKENS)
    with fresh_tenant(running, model, RECORDS) as tenant:
        yield Study(tenant)


@pytest.fixture(scope="module")
def second_node(running: Stand) -> Iterator[str]:
    """A second real node with our images."""
    cluster = running.cluster
    if not isinstance(cluster, LocalCluster):
        pytest.skip("kind's cluster of these tests has one node; the embedded one can lose a second")
    with cluster.second_node([running.images.preflight, running.images.trainer]) as name:
        yield name


@pytest.fixture
def only_second(running: Stand, second_node: str) -> Iterator[str]:
    """The second node, and the first one closed to new pods until the test opens it."""
    kubectl, first = running.cluster.kubectl, running.cluster.node_name
    kubectl("cordon", first)
    kubectl("uncordon", second_node)
    yield second_node
    kubectl("uncordon", first)
    kubectl("cordon", second_node)


def tell(case: str, recovery: Recovery) -> None:
    """For the figures of docs/reliability.md (`pytest -s`)."""
    print(f"\n{case}: {recovery.seconds:.1f} s to the first new step, {recovery.steps_lost} steps made again")


def test_a_pod_an_operator_and_the_storage_that_fail_at_once_lose_nothing(study: Study) -> None:
    study.undisturbed(STEPS)
    run = study.start("all-at-once", STEPS)
    step = run.at_step(STEPS // 4 + 1)
    since = time.monotonic()
    with study.tenant.stand.s3.stopped():
        run.delete_pod()
        kill_operator(study.tenant)
        time.sleep(20)
    recovery = run.back(step, since)
    tell("pod deleted, operator killed, storage away for 20 s", recovery)
    study.check(run, STEPS, "Stopped")
    # The save in flight when the storage went may be lost with the one that the stop asks for.
    assert recovery.steps_lost <= 2 * INTERVAL


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["with time to save", "without"])
def test_a_deleted_pod_loses_at_most_what_it_had_no_time_to_save(study: Study, force: bool) -> None:
    study.undisturbed(STEPS)
    run = study.start("killed" if force else "deleted", STEPS)
    step = run.at_step(STEPS // 2)
    since = time.monotonic()
    run.delete_pod(force=force)
    recovery = run.back(step, since)
    tell(f"pod deleted{' by force' if force else ''}", recovery)
    # By force the pod takes its last words with it.
    study.check(run, STEPS, "AttemptDeleted" if force else "Stopped")
    assert recovery.steps_lost <= (2 * INTERVAL if force else 1)


@pytest.mark.slow
def test_an_operator_killed_with_the_trainer_finds_out_and_goes_on(study: Study) -> None:
    study.undisturbed(STEPS)
    run = study.start("both-killed", STEPS)
    step = run.at_step(STEPS // 2)
    since = time.monotonic()
    kill_operator(study.tenant)
    run.delete_pod()
    recovery = run.back(step, since)
    tell("operator killed with the pod", recovery)
    study.check(run, STEPS, "Stopped")
    assert recovery.steps_lost <= 1


@pytest.mark.slow
def test_training_goes_on_while_the_storage_is_away_for_two_minutes(study: Study) -> None:
    steps = study.steps_of(AWAY_SECONDS * 1.5)
    study.undisturbed(steps)
    run = study.start("no-storage", steps)
    before = run.at_step(steps // 10)
    with study.tenant.stand.s3.stopped():
        time.sleep(AWAY_SECONDS)
        during = run.progress(1)
    assert during is not None and during["step"] > before + INTERVAL
    print(f"\nstorage away for {AWAY_SECONDS} s: {during['step'] - before} of {steps} steps made meanwhile")
    status = study.check(run, steps)
    assert status["attempt"] == 1


@pytest.mark.slow
def test_a_drained_node_gives_its_run_to_another_one(study: Study, only_second: str) -> None:
    study.undisturbed(STEPS)
    run = study.start("drained", STEPS)
    step = run.at_step(STEPS // 2)
    kubectl, first = study.tenant.stand.cluster.kubectl, study.tenant.stand.cluster.node_name
    kubectl("uncordon", first)
    since = time.monotonic()
    kubectl("drain", only_second, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")
    recovery = run.back(step, since)
    tell("node drained", recovery)
    assert node_of(run, 2) == first
    study.check(run, STEPS, "Evicted")
    assert recovery.steps_lost <= 1


@pytest.mark.slow
def test_a_lost_node_whose_pod_trains_on_cannot_spoil_the_run(study: Study, only_second: str) -> None:
    study.undisturbed(STEPS)
    run = study.start("node-lost", STEPS)
    step = run.at_step(STEPS // 4 + 1)
    cluster = study.tenant.stand.cluster
    pod = run.pods(1)[0]
    since = time.monotonic()
    with network.cut_off(pod["status"]["podIP"]):
        cluster.stop_component("kubelet-1")
        cluster.kubectl("uncordon", cluster.node_name)
        recovery = run.back(step, since, seconds=NODE_LOST_SECONDS)
    tell("node lost", recovery)
    # The pod has made its last step meanwhile, and wants to publish: the newer attempt's fence ends it.
    run.until_silent(1, 120)
    assert node_of(run, 2) == cluster.node_name
    cluster.start_component("kubelet-1")
    status = study.check(run, STEPS, "NodeLost")
    assert status["attempts"][0]["avoidNode"] == only_second
    assert recovery.steps_lost <= 2 * INTERVAL


@pytest.mark.slow
def test_a_pod_of_two_that_is_deleted_brings_both_back(study: Study) -> None:
    kubectl = study.tenant.stand.cluster.kubectl
    pool = kubectl.json("get", "gpupool", "cpu")
    kubectl.apply({**pool, "metadata": {"name": "pair"}, "spec": {**pool["spec"], "maxNodes": 2}})
    pair = {"pool": "pair", "nodes": 2, "gpus": 1}
    study.undisturbed(STEPS, nodes=2, resources=pair)
    run = study.start("one-of-two", STEPS, resources=pair)
    step = run.at_step(STEPS // 2)
    since = time.monotonic()
    run.delete_pod(index=1)
    recovery = run.back(step, since)
    tell("one pod of two deleted", recovery)
    study.check(run, STEPS, "Stopped", nodes=2)
    assert recovery.steps_lost <= 1


def node_of(run: Watched, attempt: int) -> str:
    """The node of the attempt's pod."""
    return str(run.pods(attempt)[0]["spec"]["nodeName"])
