"""The preflight Job: a small pod that reads data, model config and output with the job's own credentials."""

from __future__ import annotations

from finetune_api import naming
from finetune_api.digest import canonical_json
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import References, preflight_file
from finetune_api.runfile import RunJob
from finetune_operator.config import Config
from finetune_operator.render.metadata import Manifest, labels, owned_by_attempt, owned_by_job
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

COMMAND = ["python", "-m", "finetune_trainer.preflight", "--file", naming.PREFLIGHT_FILE_PATH]
RESOURCES = {
    "requests": {"cpu": "250m", "memory": "512Mi", "ephemeral-storage": "1Gi"},
    "limits": {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "4Gi"},
}
GRACE_SECONDS = 5


def preflight_job(job: JobView, spec: FineTuneJobSpec, references: References, config: Config) -> Manifest:
    """The preflight Job of the job's generation, suspended."""
    name = naming.preflight_name(job.name, job.uid, job.generation)
    found = labels(job, naming.ROLE_PREFLIGHT, job.generation)
    volume_list, mounts = volumes(references, name)
    pod = {
        **pod_spec(spec, config, references),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [
            {
                **container(naming.PREFLIGHT_CONTAINER, config.preflight_image, config, COMMAND, RESOURCES),
                "env": environment(config, references),
                "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108  a volume of the pod
            }
        ],
        "volumes": [*volume_list, {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}}],
    }
    template = {"metadata": {"labels": {**found, **NO_SIDECARS}, "annotations": NO_SIDECAR_ANNOTATIONS}, "spec": pod}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            "labels": found,
            "ownerReferences": owned_by_job(job),
        },
        "spec": job_spec(
            template,
            naming.PREFLIGHT_CONTAINER,
            pods=1,
            extra={"activeDeadlineSeconds": int(config.preflight_timeout_seconds)},
        ),
    }


def preflight_config_map(job: JobView, spec: FineTuneJobSpec, references: References, owner: ChildJob) -> Manifest:
    """What preflight has to check, owned by its Job."""
    file = preflight_file(spec, RunJob(name=job.name, namespace=job.namespace, uid=job.uid), references)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": owner.name,
            "namespace": job.namespace,
            "labels": labels(job, naming.ROLE_PREFLIGHT, job.generation),
            "ownerReferences": owned_by_attempt(owner.name, owner.uid),
        },
        "immutable": True,
        "data": {"preflight.json": canonical_json(file.to_json())},
    }
