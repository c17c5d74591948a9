"""What a reconcile looks at: frozen values, complete before anything is decided. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import Pool
from finetune_api.status import FineTuneJobStatus


@dataclass(frozen=True)
class JobView:
    """The FineTuneJob. `spec` is None where this release cannot read it; `spec_error` then says (field, why)."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: FineTuneJobSpec | None
    status: FineTuneJobStatus
    spec_error: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """namespace/name, as on the queue."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class ChildJob:
    """A batch Job whose controller is the FineTuneJob.

    number: the attempt, or the generation that a preflight checks.
    started: when it was last let run; None before that.
    finished: None while it runs, else "Complete" or "Failed" (never "FailureTarget").
    """

    name: str
    uid: str
    role: str
    number: int
    created: datetime
    started: datetime | None = None
    deleting: bool = False
    suspended: bool = False
    finished: str | None = None
    reason: str = ""
    message: str = ""

    def waited(self, now: datetime) -> float:
        """Seconds since its pods could start."""
        return (now - (self.started or self.created)).total_seconds()


@dataclass(frozen=True)
class PodView:
    """A pod of one of the child Jobs. `ended` tells that the container with our program has ended."""

    name: str
    uid: str
    job_uid: str
    role: str
    index: int
    phase: str
    created: datetime
    node: str | None = None
    scheduled: datetime | None = None
    """When it got its node."""
    started: datetime | None = None
    """When the container with our program started."""
    deletion_time: datetime | None = None
    """When its grace period is over."""
    unschedulable: str = ""
    waiting_reason: str = ""
    waiting_message: str = ""
    ended: bool = False
    exit_code: int | None = None
    exit_reason: str = ""
    exit_time: datetime | None = None
    termination_message: str = ""
    reason: str = ""
    """status.reason, such as Evicted."""
    message: str = ""
    disruption: str | None = None
    """The reason of a true DisruptionTarget condition."""

    @property
    def running(self) -> bool:
        """Whether it runs and nobody has asked it to stop."""
        return self.phase == "Running" and self.deletion_time is None

    @property
    def over(self) -> bool:
        """Whether it holds no resources any more."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True)
class WarningEvent:
    """A warning event about a child: the only trace of a pod that could not be created or mounted."""

    object_uid: str
    reason: str
    message: str


@dataclass(frozen=True)
class PlanFile:
    """The plan's ConfigMap: its UID and the run file's text, which is None when the key is gone."""

    uid: str
    text: str | None


@dataclass(frozen=True)
class Obstacle:
    """A child that the API server would not create. failure_class: a row of the failure table."""

    kind: str
    name: str
    failure_class: str
    message: str


@dataclass(frozen=True)
class Snapshot:
    """Everything that `decide` may look at, the time included.

    unreachable_nodes: nodes that are gone or not ready, among those that hold a pod past its grace period or one of a
        gang of which another pod has failed.
    obstacles: what stood in the way of this reconcile's own actions.
    named_jobs: the FineTuneJobs that the spec names and that exist, while they still have to be looked at.
    """

    now: datetime
    job: JobView
    pools: tuple[Pool, ...] = ()
    preflights: tuple[ChildJob, ...] = ()
    attempts: tuple[ChildJob, ...] = ()
    pods: tuple[PodView, ...] = ()
    plan_file: PlanFile | None = None
    warnings: tuple[WarningEvent, ...] = ()
    unreachable_nodes: frozenset[str] = frozenset()
    obstacles: tuple[Obstacle, ...] = ()
    named_jobs: tuple[JobView, ...] = ()

    @property
    def status(self) -> FineTuneJobStatus:
        """The status as it was read."""
        return self.job.status

    def attempt(self, name: str) -> ChildJob | None:
        """Our attempt Job of that name."""
        return next((child for child in self.attempts if child.name == name), None)

    def pods_of(self, job_uid: str | None) -> tuple[PodView, ...]:
        """Pods of one Job in the order of their index."""
        found = (pod for pod in self.pods if pod.job_uid == job_uid)
        return tuple(sorted(found, key=lambda pod: (pod.index, pod.created)))

    def pool(self, name: str) -> Pool | None:
        """The GPUPool of that name."""
        return next((pool for pool in self.pools if pool.name == name), None)

    def warnings_about(self, uids: Sequence[str]) -> tuple[WarningEvent, ...]:
        """Warnings about any of the objects."""
        return tuple(warning for warning in self.warnings if warning.object_uid in uids)
