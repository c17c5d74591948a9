"""The poller by itself against the real API server: what it writes, and what it leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from kubernetes.aio import client, config

from finetune_api import naming
from finetune_api.documents import ProgressDocument, Stage, TerminationMessage
from finetune_operator.progress import Poller, ProgressSettings
from tests.api import objects
from tests.api.fake_trainer import FakeTrainers
from tests.api.rest import Api, Object
from tests.api.tenant import until
from tests.cluster.kwok import ANNOTATIONS
from tests.cluster.local import LocalCluster

pytestmark = pytest.mark.usefixtures("without_operator")

SETTINGS = ProgressSettings(interval_seconds=0.3, writes_per_second=20)


class Run:
    """A job with one attempt of one pod, made by hand in the place of the operator."""

    def __init__(self, api: Api, namespace: str, name: str = "faq") -> None:
        self.api, self.namespace, self.name = api, namespace, name
        self.uid = api.create("finetunejobs", objects.job(name, namespace))["metadata"]["uid"]
        owner = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "name": name,
            "uid": self.uid,
            "controller": True,
        }
        labels = {**naming.MANAGED_BY, naming.LABEL_ROLE: naming.ROLE_TRAINER, naming.LABEL_ATTEMPT: "1"}
        job = api.create(
            "jobs",
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": [owner]},
                "spec": {
                    "completionMode": "Indexed",
                    "completions": 1,
                    "parallelism": 1,
                    "backoffLimit": 0,
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {
                            "restartPolicy": "Never",
                            "nodeSelector": {"for": "progress"},
                            "containers": [{"name": naming.TRAINER_CONTAINER, "image": "none"}],
                        },
                    },
                },
            },
        )
        self.operator_says(
            state="Training",
            attempt=1,
            plan=objects.plan(),
            current={
                "number": 1,
                "jobUID": job["metadata"]["uid"],
                "released": True,
                "startTime": "2026-01-01T00:00:00Z",
            },
        )
        self.pod = until(
            lambda: api.list("pods", namespace, f"batch.kubernetes.io/job-name={name}"),
            lambda pods: pods and pods[0]["status"].get("phase") == "Running" and pods,
        )[0]

    def operator_says(self, **status: Any) -> Object:
        """A status write in the operator's name."""
        body = objects.job(self.name, self.namespace)
        del body["spec"]
        status = {"observedGeneration": 1, **status}
        return self.api.apply("finetunejobs", {**body, "status": status}, manager=naming.MANAGER_OPERATOR, status=True)

    def get(self) -> Object:
        return self.api.get("finetunejobs", self.namespace, self.name)

    def progress(self) -> Object:
        found: Object = self.get()["status"].get("progress", {})
        return found

    async def shows(self, what: Callable[[Object], Any], seconds: float = 10) -> Object:
        """status.progress once `what` of it is true."""
        return await asyncio.to_thread(until, self.progress, what, seconds)

    def ends(self, message: str, code: int) -> None:
        notes = {ANNOTATIONS + "termination-message": message, ANNOTATIONS + "exit-code": str(code)}
        self.api.patch("pods", self.namespace, self.pod["metadata"]["name"], {"metadata": {"annotations": notes}})


@pytest.fixture(scope="module", autouse=True)
def node(cluster: LocalCluster) -> Iterator[None]:
    """A node that only these pods choose."""
    cluster.nodes.add("progress-0", gpus=0, labels={"for": "progress"})
    yield
    cluster.nodes.remove("progress-0")


@pytest.fixture
def run(api: Api, namespace: str) -> Run:
    return Run(api, namespace)


@asynccontextmanager
async def connected(cluster: LocalCluster) -> AsyncIterator[Poller]:
    """The poller at work, which sees only what the test shows it."""
    settings = client.Configuration()
    await config.load_kube_config(str(cluster.kubeconfig), client_configuration=settings)
    async with client.ApiClient(settings) as connection:
        poller = Poller(connection, SETTINGS)
        async with running(poller.run()):
            yield poller


@asynccontextmanager
async def polling(cluster: LocalCluster, api: Api, namespace: str) -> AsyncIterator[Poller]:
    """The poller at work; three lists a few times a second stand for the watch."""
    async with connected(cluster) as poller:

        async def watch() -> None:
            while True:
                for plural, saw in (
                    ("finetunejobs", poller.saw_job),
                    ("jobs", poller.saw_attempt),
                    ("pods", poller.saw_pod),
                ):
                    for body in await asyncio.to_thread(api.list, plural, namespace):
                        saw(body)
                await asyncio.sleep(0.1)

        async with running(watch()):
            yield poller


@asynccontextmanager
async def running(work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """The work goes on for as long as the block; its error is the block's."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def says(trainers: FakeTrainers, run: Run, step: int, **facts: Any) -> None:
    document = ProgressDocument.model_validate(
        {
            "attempt": 1,
            "stage": Stage.TRAINING,
            "step": step,
            "total_steps": 1000,
            "loss": 1.2344,
            "eta_seconds": 7440,
            **facts,
        }
    )
    trainers.says(run.pod["status"]["podIP"], document)


async def test_progress_is_written_beside_the_operators_status(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    before = run.get()["status"]
    says(trainers, run, 420)
    async with polling(cluster, api, namespace):
        shown = await run.shows(lambda progress: progress.get("step") == 420)
        assert (shown["summary"], shown["lossText"], shown["eta"]) == ("42% 420/1000", "1.234", "2h04m")
        says(trainers, run, 421)
        await run.shows(lambda progress: progress["step"] == 421)
    after = run.get()
    assert {key: value for key, value in after["status"].items() if key != "progress"} == before
    [entry] = [e for e in after["metadata"]["managedFields"] if e["manager"] == naming.MANAGER_PROGRESS]
    assert entry["subresource"] == "status"
    assert list(entry["fieldsV1"]["f:status"]) == ["f:progress"]


async def test_nothing_is_written_while_nothing_changes(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    address = run.pod["status"]["podIP"]
    says(trainers, run, 7)
    async with polling(cluster, api, namespace):
        await run.shows(lambda progress: progress.get("step") == 7)
        version, asked = run.get()["metadata"]["resourceVersion"], trainers.asked(address)
        await asyncio.to_thread(until, lambda: trainers.asked(address), lambda now: now >= asked + 4)
        assert run.get()["metadata"]["resourceVersion"] == version


async def test_a_busy_operator_neither_stops_progress_nor_loses_a_field(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    status = {key: value for key, value in run.get()["status"].items() if key != "progress"}
    async with polling(cluster, api, namespace):
        for step in range(30):
            says(trainers, run, step)
            await asyncio.to_thread(run.operator_says, **{**status, "message": f"write {step}"})
            await asyncio.sleep(0.05)
        await run.shows(lambda progress: progress.get("step") == 29)
    assert run.get()["status"]["message"] == "write 29"
    assert run.get()["status"]["plan"] == objects.plan()


async def test_a_slow_pod_is_asked_again_and_again(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    address = run.pod["status"]["podIP"]
    says(trainers, run, 1)
    trainers.delay_seconds = 0.4
    try:
        async with polling(cluster, api, namespace):
            await asyncio.to_thread(until, lambda: trainers.asked(address), lambda asked: asked >= 4)
    finally:
        trainers.delay_seconds = 0.0


async def test_a_new_job_of_the_same_name_never_gets_the_old_ones_progress(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    says(trainers, run, 420)
    old, job = run.get(), api.get("jobs", namespace, run.name)
    api.delete("finetunejobs", namespace, run.name)
    api.create("finetunejobs", objects.job(run.name, namespace))
    run.operator_says(state="Starting", attempt=1)
    async with connected(cluster) as poller:
        poller.saw_job(old)
        poller.saw_attempt(job)
        poller.saw_pod(run.pod)
        address = run.pod["status"]["podIP"]
        await asyncio.to_thread(until, lambda: trainers.asked(address), lambda asked: asked >= 3)
    assert run.progress() == {}


async def test_a_pod_that_answers_nonsense_costs_only_its_own_progress(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    other = Run(api, namespace, "other")
    says(trainers, run, 5, attempt=2)
    says(trainers, other, 5)
    async with polling(cluster, api, namespace):
        await other.shows(lambda progress: progress.get("step") == 5)
        address = run.pod["status"]["podIP"]
        await asyncio.to_thread(until, lambda: trainers.asked(address), lambda asked: asked >= 2)
        assert run.progress() == {}
        says(trainers, run, 6)
        await run.shows(lambda progress: progress.get("step") == 6)


async def test_the_last_word_comes_from_the_pods_end(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    says(trainers, run, 420)
    async with polling(cluster, api, namespace):
        await run.shows(lambda progress: progress.get("step") == 420)
        trainers.stops(run.pod["status"]["podIP"])
        message = TerminationMessage(outcome="Succeeded", step=1000, checkpoint_step=1000, eval_loss=1.1)
        run.ends(message.encode().decode(), 0)
        shown = await run.shows(lambda progress: progress["step"] == 1000)
    assert (shown["summary"], shown["stage"], shown["eta"]) == ("100% 1000/1000", "Done", "")
    assert (shown["lossText"], shown["evalLoss"], shown["checkpointStep"]) == ("1.234", 1.1, 1000)
    assert "etaSeconds" not in shown


async def test_a_failure_leaves_the_step_and_takes_the_eta_away(
    cluster: LocalCluster, api: Api, namespace: str, run: Run, trainers: FakeTrainers
) -> None:
    says(trainers, run, 420)
    async with polling(cluster, api, namespace):
        await run.shows(lambda progress: progress.get("step") == 420)
        run.ends("not our message", 137)
        shown = await run.shows(lambda progress: progress["eta"] == "")
    assert (shown["summary"], shown["stage"]) == ("42% 420/1000", "Training")
