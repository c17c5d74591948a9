"""From a job file to a plan on this machine: references, preflight, plan. Nothing is shown or started here."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api.base import Document
from finetune_api.failures import FinetuneError
from finetune_api.job import Credentials, FineTuneJobSpec, Resources, Storage
from finetune_api.planner import (
    Planned,
    References,
    build_references,
    make_plan,
    preflight_file,
    spec_digest,
    unsupported,
)
from finetune_api.runfile import PreflightFile, Reference, RunJob, StorageAccess
from finetune_api.status import Preflight
from finetune_trainer.cli.jobfile import JobFile
from finetune_trainer.cli.machine import local_pools
from finetune_trainer.preflight import run_preflight

_IMAGE = "this machine"
# What a cluster does with a job and one machine does not.
_CLUSTER_ONLY = (
    "queue_name",
    "priority_class_name",
    "retry",
    "deadline_seconds",
    "suspend",
    "cancel",
    "ttl_seconds_after_finished",
)


@dataclass(frozen=True)
class LocalJob:
    """A job as this machine runs it. notes: what of the file counts in a cluster only."""

    file: JobFile
    spec: FineTuneJobSpec
    job: RunJob
    references: References
    notes: tuple[str, ...]


def localise(file: JobFile, output_dir: Path | None, environment: Mapping[str, str]) -> LocalJob:
    """The job with its places on this machine; the same file and output always give the same UID, so a rerun resumes.

    Raises FinetuneError: UnsupportedField, InvalidSpec.
    """
    spec, notes = file.spec, []
    if output_dir is not None:
        target = spec.output.model_copy(update={"uri": output_dir.absolute().as_uri(), "storage": None})
        spec = spec.model_copy(update={"output": target})
    for name in _CLUSTER_ONLY:
        if getattr(spec, name) is not None:
            notes.append(f"{type(spec).model_fields[name].alias or name} counts in a cluster only")
            spec = spec.model_copy(update={name: None})
    spec, pool_notes = _without_foreign_pool(spec)
    notes += pool_notes
    if _names_credentials(spec):
        notes.append("credentials name objects of a cluster; here AWS_* and HF_TOKEN of the environment count")
    refused = unsupported(spec)
    if refused:
        raise FinetuneError(
            "; ".join(item.message for item in refused), failure_class="UnsupportedField", field=refused[0].field
        )
    uid = uuid.uuid5(uuid.NAMESPACE_URL, f"{file.namespace}/{file.name} {spec_digest(spec)}")
    job = RunJob(name=file.name, namespace=file.namespace, uid=str(uid))
    references = build_references(spec, _storage_of(environment), local=True)
    return LocalJob(file, spec, job, references, tuple(notes))


def check(local: LocalJob, environment: Mapping[str, str]) -> Preflight:
    """What preflight finds about model, data and output."""
    return run_preflight(_preflight_file(local), environment)


def check_offline(local: LocalJob, environment: Mapping[str, str], scratch: Path) -> tuple[Preflight | None, list[str]]:
    """Preflight of what lies on this machine, and what was left out. None if model or data lie elsewhere.

    scratch: an empty folder that stands for an output elsewhere.
    """
    file = _preflight_file(local)
    inputs = [file.model, *file.sources, *([file.validation] if file.validation else [])]
    inputs += [item.reference for item in file.further]
    remote = [reference.uri for reference in inputs if not _is_here(reference)]
    skipped = [f"{uri} was not looked at" for uri in remote]
    if file.publish is not None:
        skipped.append(f"{file.publish.target.uri} was not asked whether it takes the artifact")
        file = file.model_copy(update={"publish": None})
    if not _is_here(file.output):
        skipped.append(f"{file.output.uri} was not tried: keys, bucket and owner may be wrong")
        here = Reference(uri=scratch.absolute().as_uri(), access=StorageAccess())
        file = file.model_copy(update={"output": here})
    if remote:
        return None, [*skipped, "without them there is no plan; run the command without --offline"]
    return run_preflight(file, environment), skipped


def plan(local: LocalJob, preflight: Preflight) -> Planned:
    """The run on this machine. Raises FinetuneError: NoPoolFits, InvalidSpec."""
    resources = local.spec.resources or Resources()
    pools = local_pools(resources.gpus or 1)
    return make_plan(local.spec, local.job, preflight, local.references, pools, _IMAGE)


def _preflight_file(local: LocalJob) -> PreflightFile:
    return preflight_file(local.spec, local.job, local.references, local=True)


def _is_here(reference: Reference) -> bool:
    return reference.uri.startswith("file://")


def _without_foreign_pool(spec: FineTuneJobSpec) -> tuple[FineTuneJobSpec, list[str]]:
    resources = spec.resources
    if resources is None or resources.pool is None or resources.pool in {pool.name for pool in local_pools(1)}:
        return spec, []
    here = resources.model_copy(update={"pool": None})
    return (
        spec.model_copy(update={"resources": here}),
        [f"resources.pool: {resources.pool} counts in a cluster only; this machine is the pool"],
    )


def _names_credentials(part: Document) -> bool:
    """Whether this part of the spec or one below it names credentials."""
    values = [getattr(part, name) for name in type(part).model_fields]
    below = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return any(
        isinstance(item, Credentials) or (isinstance(item, Document) and _names_credentials(item)) for item in below
    )


def _storage_of(environment: Mapping[str, str]) -> Storage:
    return Storage(
        endpoint=environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None,
        region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None,
    )


def at_work(local: LocalJob, work: Path | None, environment: Mapping[str, str]) -> Path:
    """The folder for local copies, logs and the agent's work directory; one per job and output."""
    if work is not None:
        return work.absolute()
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "finetune" / f"{local.job.name}-{local.job.uid[:8]}"
