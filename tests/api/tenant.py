"""What a tenant does, and what pods do for her: apply, wait, pass preflight, train, end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from finetune_api import naming
from finetune_api.documents import ProgressDocument, Stage, TerminationMessage
from finetune_api.failures import TABLE
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import spec_digest
from finetune_api.status import DataFacts, Finding, ModelFacts, Preflight
from tests.api import objects
from tests.api.fake_trainer import FakeTrainers
from tests.api.rest import Api, Object
from tests.cluster.kwok import ANNOTATIONS

BILLION = 10**9
PATIENCE = 60.0  # seconds: several times what a step takes on two busy cores


class Tenant:
    """One namespace and its jobs. Every wait has an end and says what it saw last."""

    def __init__(self, api: Api, trainers: FakeTrainers, namespace: str) -> None:
        self.api = api
        self.trainers = trainers
        self.namespace = namespace

    # -- jobs ------------------------------------------------------------

    def apply(self, name: str, **spec: Any) -> Object:
        """A new job; see objects.job."""
        return self.api.create("finetunejobs", objects.job(name, self.namespace, **spec))

    def edit(self, name: str, **spec: Any) -> Object:
        """A merge patch of the job's spec."""
        return self.api.patch("finetunejobs", self.namespace, name, {"spec": spec})

    def get(self, name: str) -> Object:
        """The job."""
        return self.api.get("finetunejobs", self.namespace, name)

    def status(self, name: str) -> Object:
        """The job's status."""
        status: Object = self.get(name)["status"]
        return status

    def wait(self, name: str, what: Callable[[Object], Any], seconds: float = PATIENCE) -> Object:
        """The status once `what` of it is true."""
        return until(lambda: self.status(name), what, seconds)

    def wait_state(self, name: str, state: str, seconds: float = PATIENCE) -> Object:
        """The status once its state is this word."""
        return self.wait(name, lambda status: status.get("state") == state, seconds)

    # -- pods ------------------------------------------------------------

    def pods(self, name: str, role: str, attempt: int | None = None) -> list[Object]:
        """The job's pods of one role, and of one attempt, by index."""
        labels = f"{naming.LABEL_JOB}={name},{naming.LABEL_ROLE}={role}"
        if attempt is not None:
            labels += f",{naming.LABEL_ATTEMPT}={attempt}"
        return sorted(self.api.list("pods", self.namespace, labels), key=index)

    def running(self, name: str, attempt: int = 1, count: int = 1, seconds: float = PATIENCE) -> list[Object]:
        """The attempt's pods, once so many run and are not being deleted."""
        return until(
            lambda: self.pods(name, naming.ROLE_TRAINER, attempt),
            lambda pods: sum(_runs(pod) for pod in pods) == count and pods,
            seconds,
        )

    def end(self, pod: Object, message: str = "", exit_code: int = 0, reason: str | None = None) -> None:
        """The pod's containers end."""
        notes = {"termination-message": message, "exit-code": str(exit_code)}
        if reason:
            notes["termination-reason"] = reason
        meta = {"annotations": {ANNOTATIONS + key: value for key, value in notes.items()}}
        self.api.patch("pods", self.namespace, pod["metadata"]["name"], {"metadata": meta})

    def jobs(self, name: str, role: str = naming.ROLE_TRAINER) -> list[Object]:
        """The batch Jobs of a job, by name."""
        found = self.api.list("jobs", self.namespace, f"{naming.LABEL_JOB}={name},{naming.LABEL_ROLE}={role}")
        return sorted(found, key=lambda job: str(job["metadata"]["name"]))

    # -- preflight ------------------------------------------------------------

    def preflight(
        self, name: str, result: Preflight | None = None, *, parameters: int = 7 * BILLION, seconds: float = PATIENCE
    ) -> None:
        """The preflight pod of the job's present generation ends, by default well and with a model of that size."""
        generation = self.get(name)["metadata"]["generation"]
        job = naming.preflight_name(name, self.get(name)["metadata"]["uid"], generation)
        pods = until(
            lambda: self.api.list("pods", self.namespace, f"batch.kubernetes.io/job-name={job}"),
            lambda found: sum(_runs(pod) for pod in found) == 1 and found,
            seconds,
        )
        found = result or passed(self.get(name)["spec"], parameters)
        code = 0 if found.ok else TABLE[found.findings[0].failure_class].exit_code
        assert code is not None
        self.end(pods[0], found.model_dump_json(by_alias=True, exclude_none=True), code)

    def start(self, name: str, *, parameters: int = 7 * BILLION, count: int = 1, **spec: Any) -> list[Object]:
        """A new job up to its running pods."""
        self.apply(name, **spec)
        self.preflight(name, parameters=parameters)
        return self.running(name, count=count)

    # -- training ------------------------------------------------------------

    def trains(self, pod: Object, step: int, total: int, attempt: int = 1, **facts: Any) -> None:
        """The pod's agent answers with this progress from now on."""
        document = ProgressDocument.model_validate(
            {"attempt": attempt, "stage": Stage.TRAINING, "step": step, "total_steps": total, **facts}
        )
        self.trainers.says(pod["status"]["podIP"], document)

    def succeeds(self, pod: Object, step: int, **facts: Any) -> None:
        """The pod ends with the agent's message of success."""
        message = TerminationMessage.model_validate(
            {"outcome": "Succeeded", "step": step, "checkpoint_step": step, "artifact": "adapter", **facts}
        )
        self.end(pod, message.encode().decode())

    def fails(self, pod: Object, failure_class: str, message: str = "it broke", **facts: Any) -> None:
        """The pod ends with the agent's message and exit code of a row of the failure table."""
        document = TerminationMessage.model_validate({"outcome": failure_class, "message": message, **facts})
        code = TABLE[failure_class].exit_code
        assert code is not None
        self.end(pod, document.encode().decode(), code)


def passed(spec: Mapping[str, Any], parameters: int = 7 * BILLION) -> Preflight:
    """What preflight says of a good job with a model of that size."""
    return Preflight(
        ok=True,
        spec_digest=spec_digest(FineTuneJobSpec.from_json(spec)),
        model=ModelFacts(
            model_type="llama",
            parameters=parameters,
            weight_bytes=2 * parameters,
            hidden_size=4096,
            layers=32,
            vocabulary_size=32000,
            max_positions=4096,
            digest="sha256:0a",
        ),
        data=DataFacts(
            rows=1000,
            format="PromptCompletion",
            tokens=500_000,
            longest_tokens=1024,
            p95_tokens=800,
            bytes=2_000_000,
            digest="sha256:0b",
        ),
    )


def refused(spec: Mapping[str, Any], failure_class: str, message: str, field: str | None = None) -> Preflight:
    """What preflight says of a job with one fault."""
    finding = Finding(failure_class=failure_class, message=message, field=field)
    return Preflight(
        ok=False, spec_digest=spec_digest(FineTuneJobSpec.from_json(spec)), findings=[finding], findings_total=1
    )


def until(look: Callable[[], Any], what: Callable[[Any], Any], seconds: float = PATIENCE) -> Any:
    """What `look` returns once `what` of it is true; TimeoutError shows what it returned last."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if what(seen):
            return seen
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s; last seen: {_short(seen)}")
        time.sleep(0.1)


def condition(status: Mapping[str, Any], kind: str) -> Object:
    """The condition of that type; empty where there is none."""
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


def is_true(kind: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether that condition of a status is True."""
    return lambda status: condition(status, kind).get("status") == "True"


def index(pod: Mapping[str, Any]) -> int:
    """The pod's index in its gang."""
    return int(pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))


def _short(seen: Any) -> str:
    """What was seen, without what only the API server reads."""
    if isinstance(seen, list):
        return "; ".join(_short(item) for item in seen)[:4000]
    if isinstance(seen, dict) and "metadata" in seen:
        return f"{seen['metadata']['name']}: {seen.get('status')}"[:2000]
    return str(seen)[:4000]


def _runs(pod: Mapping[str, Any]) -> bool:
    return pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
