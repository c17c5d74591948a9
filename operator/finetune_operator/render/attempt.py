"""An attempt: one indexed Job, and the ConfigMap, Service and NetworkPolicy that it owns."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api import naming
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import Pool, References
from finetune_api.pool import GPUPoolSpec
from finetune_api.status import Plan
from finetune_operator.config import Config
from finetune_operator.render.metadata import Manifest, labels, owned_by_attempt, owned_by_job
from finetune_operator.render.network import network_policy, service
from finetune_operator.render.plan import RUN_FILE_KEY
from finetune_operator.render.pod import (
    NO_SIDECAR_ANNOTATIONS,
    NO_SIDECARS,
    container,
    environment,
    job_spec,
    pod_spec,
    volumes,
)
from finetune_operator.snapshot import ChildJob, JobView

SECONDS_TO_EXIT = 5  # what is left of the grace period after the agent's own budget


@dataclass(frozen=True)
class AttemptInput:
    """What an attempt is made of. run_file: the text whose digest stands in the plan."""

    job: JobView
    spec: FineTuneJobSpec
    plan: Plan
    pool: Pool
    references: References
    number: int
    run_file: str
    avoid_nodes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the Job and of all that it owns."""
        return naming.attempt_name(self.job.name, self.job.uid, self.number)

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the Job, its pods and all that it owns."""
        return labels(self.job, naming.ROLE_TRAINER, self.number, self.plan.pool)


def attempt_job(attempt: AttemptInput, config: Config) -> Manifest:
    """The attempt's Job, suspended."""
    name = attempt.name
    template = {
        "metadata": {"labels": {**attempt.labels, **NO_SIDECARS}, "annotations": NO_SIDECAR_ANNOTATIONS},
        "spec": _pod(attempt, config),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": attempt.job.namespace,
            "labels": attempt.labels,
            "ownerReferences": owned_by_job(attempt.job),
        },
        "spec": job_spec(template, naming.TRAINER_CONTAINER, pods=attempt.plan.nodes),
    }


def attempt_children(attempt: AttemptInput, owner: ChildJob, config: Config) -> list[Manifest]:
    """The run file, the gang's names and its network policy; they go with the Job."""
    metadata = {
        "name": attempt.name,
        "namespace": attempt.job.namespace,
        "labels": attempt.labels,
        "ownerReferences": owned_by_attempt(owner.name, owner.uid),
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {RUN_FILE_KEY: attempt.run_file},
    }
    selector = {
        naming.LABEL_JOB_UID: attempt.job.uid,
        naming.LABEL_ROLE: naming.ROLE_TRAINER,
        naming.LABEL_ATTEMPT: str(attempt.number),
    }
    return [config_map, service(metadata, selector), network_policy(metadata, selector, config.namespace)]


def _pod(attempt: AttemptInput, config: Config) -> Manifest:
    pool = attempt.pool.spec
    volume_list, mounts = volumes(attempt.references, attempt.name)
    scratch = _mebi(pool.per_gpu.ephemeral_storage_gib * attempt.plan.gpus_per_node)
    found: Manifest = {
        **pod_spec(attempt.spec, config, attempt.references),
        "terminationGracePeriodSeconds": pool.termination_grace_period_seconds,
        "subdomain": attempt.name,
        "containers": [_trainer(attempt, config, mounts)],
        "volumes": [
            *volume_list,
            {"name": "scratch", "emptyDir": {"sizeLimit": scratch}},
            {"name": "tmp", "emptyDir": {"sizeLimit": scratch}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _mebi(pool.shared_memory_gib)}},
        ],
    }
    found["tolerations"] = [*(toleration.to_json() for toleration in pool.tolerations or ()), *found["tolerations"]]
    if pool.node_selector:
        found["nodeSelector"] = dict(pool.node_selector)
    if attempt.avoid_nodes:
        found["affinity"] = _avoid(attempt.avoid_nodes)
    return found


def _trainer(attempt: AttemptInput, config: Config, mounts: list[Manifest]) -> Manifest:
    pool = attempt.pool.spec
    budget = max(1, pool.termination_grace_period_seconds - SECONDS_TO_EXIT)
    agent = ["python", "-m", "finetune_trainer.agent"]
    command = [*agent, "--run-file", naming.RUN_FILE_PATH, "--stop-budget", str(budget)]
    resources = _resources(pool, attempt.plan.gpus_per_node)
    return {
        **container(naming.TRAINER_CONTAINER, attempt.plan.trainer_image, config, command, resources),
        "env": [
            {"name": naming.ENV_ATTEMPT, "value": str(attempt.number)},
            {"name": naming.ENV_MASTER, "value": f"{attempt.name}-0.{attempt.name}"},
            *environment(config, attempt.references),
        ],
        "ports": [{"name": "progress", "containerPort": naming.PROGRESS_PORT}],
        "volumeMounts": [
            *mounts,
            {"name": "scratch", "mountPath": naming.SCRATCH_PATH},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  a volume of the pod
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  a volume of the pod
        ],
    }


def _resources(pool: GPUPoolSpec, gpus: int) -> Manifest:
    amounts = {
        "cpu": f"{round(pool.per_gpu.cpu * gpus * 1000)}m",
        "memory": _mebi(pool.per_gpu.memory_gib * gpus),
        "ephemeral-storage": _mebi(pool.per_gpu.ephemeral_storage_gib * gpus),
    }
    if pool.resource_name is not None:
        amounts[pool.resource_name] = str(gpus)
    for extra in pool.extra_resources or ():
        amounts[extra.name] = str(extra.count)
    # No limit on CPU: it would throttle the data loading and the CPU part of a step while the node has cores to spare.
    return {"requests": amounts, "limits": {name: amount for name, amount in amounts.items() if name != "cpu"}}


def _mebi(gibibytes: float) -> str:
    return f"{round(gibibytes * 1024)}Mi"


def _avoid(nodes: tuple[str, ...]) -> Manifest:
    # The node's name rather than its hostname label: the two need not be equal. A field takes one value per expression.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    terms = [{"matchFields": fields}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
