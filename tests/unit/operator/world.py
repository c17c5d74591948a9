"""A simulated API server and cluster, as far as decisions need one: the contract that DESIGN section 4 was tried on.

Objects are created once per name, deletes need the right UID, a Job starts pods only when it is not suspended, a Job
that is deleted takes its pods along after a grace period. Every action and every status write is one operation, and the
operator can be made to die right before any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from finetune_api import naming
from finetune_api.documents import TerminationMessage
from finetune_api.failures import TABLE
from finetune_api.planner import Pool, with_resolved
from finetune_api.status import FineTuneJobStatus
from finetune_operator.actions import Action, Create, Delete, Release
from finetune_operator.config import Config
from finetune_operator.decide import decide
from finetune_operator.snapshot import ChildJob, JobView, PlanFile, PodView, Snapshot
from finetune_operator.status import owned
from tests.unit.operator.builders import CONFIG, START, a_job, a_pool, passed

GRACE_SECONDS = 3
TICK_SECONDS = 1
PREFLIGHT_SECONDS = 2


class Died(Exception):
    """The operator died before this operation."""


@dataclass
class World:
    """One FineTuneJob and its children. outcomes: how the attempts end, in turn; the last one repeats."""

    job: JobView = field(default_factory=a_job)
    outcomes: tuple[str, ...] = ("Succeeded",)
    pools: tuple[Pool, ...] = field(default_factory=lambda: (a_pool(),))
    config: Config = CONFIG
    run_seconds: int = 2
    named_jobs: tuple[JobView, ...] = ()
    """Other FineTuneJobs of the namespace."""
    words: Mapping[str, Any] = field(default_factory=dict)
    """What every attempt's last words say beside its outcome."""
    preflight: tuple[int, str] | None = None
    """Exit code and last words of every preflight pod; None: it passes."""
    dies_before: int | None = None
    """The number of the operation before which the operator dies, once."""

    def __post_init__(self) -> None:
        self.now = START
        self.jobs: dict[str, ChildJob] = {}
        self.pods: dict[str, PodView] = {}
        self.config_maps: dict[str, tuple[str, str | None]] = {}  # name -> (uid, owner), the plan's only
        self.plan_text: dict[str, str] = {}
        self.others: set[tuple[str, str]] = set()
        self.operations = 0
        self.created: list[tuple[str, str]] = []  # (name, uid) of every Job ever created
        self.released: list[str] = []  # names of Jobs that were let run
        self.statuses: list[FineTuneJobStatus] = []
        self._uids = 0

    # -- the operator -----------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """One call of the operator's main flow; a death in it loses the rest of the step."""
        for _ in range(20):
            decision = decide(self.snapshot(), self.config)
            try:
                for action in decision.actions:
                    self._operation()
                    self._apply(action)
                written = owned(decision.status) != owned(self.job.status)
                if written:
                    self._operation()
                    self._write(decision.status)
            except Died:
                return
            if not decision.actions and not written:
                return
        raise AssertionError(f"the operator never comes to rest: {decision.actions} {self.job.status.state}")

    def snapshot(self) -> Snapshot:
        """What the operator sees now."""
        plan = self.config_maps.get(naming.plan_name(self.job.name, self.job.uid))
        roles = {naming.ROLE_PREFLIGHT: [], naming.ROLE_TRAINER: []}
        for child in self.jobs.values():
            roles[child.role].append(child)
        return Snapshot(
            now=self.now,
            job=self.job,
            pools=self.pools,
            preflights=tuple(roles[naming.ROLE_PREFLIGHT]),
            attempts=tuple(roles[naming.ROLE_TRAINER]),
            pods=tuple(self.pods.values()),
            plan_file=PlanFile(plan[0], plan[1]) if plan else None,
            named_jobs=self.named_jobs,
        )

    def _operation(self) -> None:
        self.operations += 1
        if self.operations - 1 == self.dies_before:
            self.dies_before = None
            raise Died

    def _apply(self, action: Action) -> None:
        match action:
            case Create():
                self._create(action)
            case Release(name, uid):
                child = self.jobs.get(name)
                if child is not None and child.uid == uid and child.suspended:
                    self.jobs[name] = replace(child, suspended=False)
                    self.released.append(name)
            case Delete(kind, name, uid):
                if kind == "ConfigMap" and self.config_maps.get(name, ("",))[0] == uid:
                    del self.config_maps[name]
                elif kind == "Job" and name in self.jobs and self.jobs[name].uid == uid:
                    self.delete_job(name)

    def _create(self, action: Create) -> None:
        metadata = action.manifest["metadata"]
        if action.kind == "Job" and action.name not in self.jobs:
            labels = metadata["labels"]
            child = ChildJob(
                name=action.name,
                uid=self._uid(),
                role=labels[naming.LABEL_ROLE],
                number=int(labels[naming.LABEL_ATTEMPT]),
                created=self.now,
                suspended=action.manifest["spec"]["suspend"],
            )
            self.jobs[action.name] = child
            self.created.append((child.name, child.uid))
        elif action.kind == "ConfigMap" and action.name == naming.plan_name(self.job.name, self.job.uid):
            self.config_maps.setdefault(action.name, (self._uid(), action.manifest["data"]["run.json"]))
        else:
            self.others.add((action.kind, action.name))

    def _write(self, status: FineTuneJobStatus) -> None:
        # what the API server stores is JSON, so what is read back has made the round trip
        stored = FineTuneJobStatus.from_json({**owned(status), **self._progress()})
        self.job = replace(self.job, status=stored)
        self.statuses.append(stored)

    def _progress(self) -> dict[str, object]:
        progress = self.job.status.progress
        return {"progress": progress.to_json()} if progress else {}

    def _uid(self) -> str:
        self._uids += 1
        return f"uid-{self._uids}"

    # -- the cluster and its people ---------------------------------------------------------------------------------

    def edit(self, **changes: object) -> None:
        """The tenant edits the spec."""
        spec = self.job.spec
        assert spec is not None
        edited = type(spec).from_json({**spec.to_json(), **changes})
        self.job = replace(self.job, spec=edited, generation=self.job.generation + 1)

    def delete_job(self, name: str) -> None:
        """The Job is gone; its pods have their grace period."""
        child = self.jobs.pop(name)
        for uid, pod in list(self.pods.items()):
            if pod.job_uid == child.uid and pod.deletion_time is None:
                self.pods[uid] = replace(pod, deletion_time=self.now + timedelta(seconds=GRACE_SECONDS))

    def tick(self) -> None:
        """One second passes: controllers and kubelets do their part."""
        self.now += timedelta(seconds=TICK_SECONDS)
        for uid, pod in list(self.pods.items()):
            if pod.deletion_time is not None and self.now >= pod.deletion_time:
                del self.pods[uid]
        for child in list(self.jobs.values()):
            if not child.suspended and child.finished is None:
                self._advance(child)

    def run(self, until: Callable[[World], bool], seconds: int = 600) -> World:
        """Lets time pass until the condition holds."""
        for _ in range(seconds):
            self.reconcile()
            if until(self):
                return self
            self.tick()
        raise AssertionError(f"still {self.job.status.state}: {self.job.status.message}")

    def run_to_the_end(self) -> World:
        """Lets time pass until the job is finished, and then some."""
        self.run(lambda world: world.job.status.completion_time is not None)
        for _ in range(5):
            self.tick()
            self.reconcile()
        return self

    def _advance(self, child: ChildJob) -> None:
        pods = [pod for pod in self.pods.values() if pod.job_uid == child.uid]
        plan = self.job.status.plan
        wanted = plan.nodes if plan is not None and child.role == naming.ROLE_TRAINER else 1
        if not pods:
            for index in range(wanted):
                self._start_pod(child, index)
        elif all(pod.phase == "Pending" for pod in pods):
            for pod in pods:
                self.pods[pod.uid] = replace(
                    pod, phase="Running", node=f"node-{pod.index}", scheduled=self.now, started=self.now
                )
        elif self.now - pods[0].created >= timedelta(seconds=self._duration(child)):
            self._finish(child, pods)

    def _duration(self, child: ChildJob) -> int:
        return self.run_seconds if child.role == naming.ROLE_TRAINER else PREFLIGHT_SECONDS

    def _start_pod(self, child: ChildJob, index: int) -> None:
        uid = self._uid()
        self.pods[uid] = PodView(
            name=f"{child.name}-{index}-{uid}",
            uid=uid,
            job_uid=child.uid,
            role=child.role,
            index=index,
            phase="Pending",
            created=self.now,
        )

    def _finish(self, child: ChildJob, pods: list[PodView]) -> None:
        assert self.job.spec is not None
        if child.role == naming.ROLE_PREFLIGHT:
            spec = with_resolved(self.job.spec, self.job.status.resolved)
            good = 0, passed(spec).model_dump_json(by_alias=True, exclude_none=True)
            (code, message), disruption = self.preflight or good, None
        else:
            outcome = self.outcomes[min(child.number, len(self.outcomes)) - 1]
            code = 0 if outcome == "Succeeded" else TABLE[outcome].exit_code or 143
            disruption = "EvictionByEvictionAPI" if outcome == "Evicted" else None
            said = {"message": f"it was {outcome}", **self.words}
            row = TABLE.get(outcome)
            last_word = "Stopped" if row is not None and row.exit_code is None else outcome  # what an agent can say
            message = TerminationMessage(outcome=last_word, **said).encode().decode()
        for pod in pods:
            self.pods[pod.uid] = replace(
                pod,
                phase="Succeeded" if code == 0 else "Failed",
                ended=True,
                exit_code=code,
                exit_time=self.now,
                termination_message=message,
                disruption=disruption,
            )
        self.jobs[child.name] = replace(child, finished="Complete" if code == 0 else "Failed")
