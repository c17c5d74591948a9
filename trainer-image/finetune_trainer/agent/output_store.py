"""The output as this attempt owns it: claimed and fenced by node 0, restored from by every node."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.digest import digest
from finetune_api.runfile import RunFile
from finetune_api.uri import parse_uri
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.sources import Reach, resolve_access
from finetune_trainer.store.artifacts import read_artifact
from finetune_trainer.store.checkpoints import restore, start_attempt
from finetune_trainer.store.claims import OnExisting, claim_output
from finetune_trainer.store.documents import CheckpointRef, Claim
from finetune_trainer.store.objects import ObjectStore, open_store
from finetune_trainer.store.writer import CheckpointWriter

# What may differ between attempts of one run without changing what is learned.
_NOT_THE_METHOD = ("micro_batch_size", "gradient_accumulation", "gradient_checkpointing")


@dataclass(frozen=True)
class OpenedOutput:
    """The output after claim, fence and restore. ref: what was restored; None on a fresh start."""

    writer: CheckpointWriter
    ref: CheckpointRef | None


def open_output(run: RunFile, reach: Reach) -> tuple[ObjectStore, str]:
    """The store and the prefix of output.uri. Nothing is contacted yet."""
    target = run.output.target
    uri = parse_uri(target.uri, field="output.uri")
    address = str(reach.claims / uri.container / uri.path) if uri.scheme == "pvc" else target.uri
    return open_store(address, resolve_access(target.access, reach.env))


def claim_of(run: RunFile) -> Claim:
    """Who this job is to the store, and what makes two runs the same run."""
    method = {
        "task": run.model.task,
        "objective": run.objective.to_json(),
        "tuning": run.tuning.to_json(),
        "hyperparameters": run.hyperparameters.model_dump(mode="json", exclude=set(_NOT_THE_METHOD)),
        "globalBatchSize": run.global_batch_size,
        "worldSize": run.world_size,
        "dataset": run.dataset.model_dump(mode="json", exclude={"sources", "validation", "digest"}),
    }
    return Claim(
        job_uid=run.job.uid,
        namespace=run.job.namespace,
        name=run.job.name,
        model_digest=run.model.digest,
        data_digest=run.dataset.digest,
        method_digest=digest(method),
    )


def published_kind(store: ObjectStore, prefix: str, run: RunFile) -> str | None:
    """`adapter` or `model` if an earlier attempt of this job published it and could not say so any more, else None."""
    artifact = read_artifact(store, prefix)
    if artifact is None or artifact.job_uid != run.job.uid:
        return None
    folders = {file.name.partition("/")[0] for file in artifact.files}
    return "adapter" if "adapter" in folders else "model"


def claim(store: ObjectStore, prefix: str, run: RunFile) -> None:
    """This job owns the output. Raises OutputInUse."""
    claim_output(store, prefix, claim_of(run), OnExisting(run.output.on_existing.value))


def begin_attempt(store: ObjectStore, prefix: str, run: RunFile, attempt: int, work: WorkDir, log: Log) -> OpenedOutput:
    """Earlier attempts are cut off; the newest whole checkpoint is in WORK/resume. For node 0 only."""
    begun = start_attempt(store, prefix, job_uid=run.job.uid, attempt=attempt, restore_to=work.resume)
    for skipped in begun.skipped:
        log.warning("checkpoint is damaged", fence=skipped.fence, step=skipped.step, reason=skipped.reason)
    step = begun.resumed.step if begun.resumed else None
    log.info("attempt begun", fence=begun.fence.fence, resumed_from_step=step)
    return OpenedOutput(CheckpointWriter(store, prefix, begun.fence), begun.resumed.ref if begun.resumed else None)


def restore_from(store: ObjectStore, prefix: str, ref: CheckpointRef | None, work: WorkDir, log: Log) -> None:
    """The checkpoint that node 0 resumes from is in WORK/resume. Writes nothing to the store."""
    if ref is not None:
        restore(store, prefix, ref, work.resume)
    log.info("attempt joined", resumed_from_step=ref.step if ref else None)
