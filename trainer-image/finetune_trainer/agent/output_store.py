"""The output as this attempt owns it: claimed and fenced by node 0, restored from by every node."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from finetune_api.digest import digest
from finetune_api.metrics import LOSS, cost
from finetune_api.runfile import RunFile
from finetune_api.uri import parse_uri
from finetune_trainer.agent.guarding import Change
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.workdir import Result, WorkDir, read_json, write_whole
from finetune_trainer.sources import Reach, resolve_access
from finetune_trainer.store import files
from finetune_trainer.store.artifacts import read_artifact
from finetune_trainer.store.checkpoints import restore, start_attempt, survey
from finetune_trainer.store.claims import OnExisting, claim_output
from finetune_trainer.store.documents import CheckpointRef, Claim, Fence
from finetune_trainer.store.errors import CheckpointInvalid
from finetune_trainer.store.objects import ObjectStore, join_key, open_store
from finetune_trainer.store.writer import CheckpointWriter

_REPORT = "report.json"
# What a run knows besides weights (worker/carry.py).
_CARRY = "run.json"
_MAX_REPORT_BYTES = 64 << 20
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
    """Who this job is to the store, and what makes two runs the same run.

    The number of processes is no part of it: the worker refuses a checkpoint that is bound to another one (ZeRO).
    """
    method = {
        "task": run.model.task,
        "objective": run.objective.to_json(),
        "tuning": run.tuning.to_json(),
        "hyperparameters": run.hyperparameters.model_dump(mode="json", exclude=set(_NOT_THE_METHOD)),
        "globalBatchSize": run.global_batch_size,
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


def published_result(store: ObjectStore, prefix: str, run: RunFile) -> Result | None:
    """What an earlier attempt of this job published and could not say any more; None if nothing."""
    artifact = read_artifact(store, prefix)
    if artifact is None or artifact.job_uid != run.job.uid:
        return None
    names = {file.name for file in artifact.files}
    folders = {name.partition("/")[0] for name in names}
    kind = next((kind for kind in ("adapter", "model") if kind in folders), "report")
    if _REPORT not in names:
        return Result(artifact=kind)
    found = json.loads(store.get(join_key(prefix, _REPORT), _MAX_REPORT_BYTES))["evaluation"]
    return Result(
        artifact=kind,
        base_eval_loss=found["base"].get("loss"),
        eval_loss=found["tuned"].get("loss"),
        unmet=found["unmet"],
    )


def download_artifact(store: ObjectStore, prefix: str, folder: Path) -> None:
    """The published files below prefix are in folder, every byte checked. Raises CheckpointInvalid."""
    artifact = read_artifact(store, prefix)
    if artifact is not None:
        files.download(store, ((join_key(prefix, file.name), file) for file in artifact.files), folder)


def claim(store: ObjectStore, prefix: str, run: RunFile) -> None:
    """This job owns the output. Raises OutputInUse."""
    claim_output(store, prefix, claim_of(run), OnExisting(run.output.on_existing.value))


def begin_attempt(
    store: ObjectStore,
    prefix: str,
    run: RunFile,
    attempt: int,
    work: WorkDir,
    log: Log,
    *,
    change: Change | None = None,
    follows: int | None = None,
) -> OpenedOutput:
    """Earlier starts are cut off; the newest whole checkpoint is in WORK/resume. For node 0 only.

    change: what a guard decided; it takes effect with this start or not at all. follows: the fence that this attempt
    holds already. Raises Superseded if another start has taken the output over.
    """
    begun = start_attempt(
        store,
        prefix,
        job_uid=run.job.uid,
        attempt=attempt,
        restore_to=work.resume,
        max_step=change.to_step if change else None,
        guards=change.guards if change else None,
        follows=follows,
    )
    for skipped in begun.skipped:
        log.warning("checkpoint is damaged", fence=skipped.fence, step=skipped.step, reason=skipped.reason)
    step = begun.resumed.step if begun.resumed else None
    restore_best(store, prefix, work, log)
    log.info("attempt begun", fence=begun.fence.fence, resumed_from_step=step)
    return OpenedOutput(CheckpointWriter(store, prefix, begun.fence), begun.resumed.ref if begun.resumed else None)


def leave_change(writer: CheckpointWriter, change: Change) -> Fence:
    """What a guard decided is in force from the next start on, which restores what this one leaves to it.

    Raises Superseded if another start has taken the output over from the writer.
    """
    return start_attempt(
        writer.store,
        writer.prefix,
        job_uid=writer.fence.job_uid,
        attempt=writer.fence.attempt,
        restore_to=None,
        max_step=change.to_step,
        guards=change.guards,
        follows=writer.fence.fence,
    ).fence


def restore_best(store: ObjectStore, prefix: str, work: WorkDir, log: Log) -> None:
    """The best step that the restored checkpoint knows of is in WORK/best, unless that is the restored one itself.

    Where the best one was never stored or is damaged, the best that is stored takes its place, of all steps that were
    measured; the restored run.json says so from then on.
    """
    carried, plan = read_json(work.resume / _CARRY) or {}, read_json(work.resume / "plan.json") or {}
    known, metric, resumed = carried.get("best") or [], carried.get("best_metric") or LOSS, plan.get("step")
    if not known or known[0][0] == resumed:
        return
    refs = {ref.step: ref for ref in survey(store, prefix).refs}
    others = sorted(_evaluations(work.resume, metric), key=lambda found: cost(metric, found[1]))
    measured = dict([*known, *others])
    ranked = [step for step in measured if step == resumed or step in refs]
    while ranked and ranked[0] != resumed:
        try:
            restore(store, prefix, refs[ranked[0]], work.best)
            break
        except CheckpointInvalid as error:
            log.warning("checkpoint is damaged", step=ranked.pop(0), reason=str(error))
    if ranked[:1] != [known[0][0]]:
        log.warning("the best checkpoint is not stored", step=known[0][0], instead=ranked[0] if ranked else None)
        best = [[step, measured[step]] for step in ranked[: len(known)]]
        write_whole(work.resume / _CARRY, json.dumps({**carried, "best": best}))


def _evaluations(checkpoint: Path, metric: str) -> list[tuple[int, float]]:
    """Step and metric of each evaluation up to a restored checkpoint."""
    try:
        history = json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"]
        found = [(entry["step"], entry[name]) for entry in history if (name := f"eval_{metric}") in entry]
        return [(step, value) for step, value in found if math.isfinite(value)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the worker says what is wrong with it


def restore_from(store: ObjectStore, prefix: str, ref: CheckpointRef | None, work: WorkDir, log: Log) -> None:
    """The checkpoint that node 0 resumes from is in WORK/resume. Writes nothing to the store."""
    if ref is not None:
        restore(store, prefix, ref, work.resume)
        restore_best(store, prefix, work, log)
    log.info("attempt joined", resumed_from_step=ref.step if ref else None)
