"""The plan: refusals that need no pod, the choice of pool and settings, and the run file that all attempts share."""

from __future__ import annotations

import json

from pydantic import ValidationError

from finetune_api.digest import digest
from finetune_api.failures import FinetuneError
from finetune_api.planner import Planned, build_references, make_plan, unsupported
from finetune_api.runfile import RunFile, RunJob
from finetune_api.status import ConditionType, Plan, State
from finetune_operator.actions import Create, Delete
from finetune_operator.decide import earlier, history, preflight
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.draft import Draft
from finetune_operator.render import plan_config_map


def refused_by_the_spec(draft: Draft) -> bool:
    """Whether spec and named jobs show that the job cannot run, or not yet; the message names every field."""
    problem = draft.seen.job.spec_error
    if problem is not None:
        field, why = problem
        preflight.refuse(draft, Cause("InvalidSpec", f"{field}: {why}", field))
        return True
    refused = unsupported(draft.spec)
    if refused:
        message = "; ".join(item.message for item in refused)
        preflight.refuse(draft, Cause("UnsupportedField", message, refused[0].field))
        return True
    return earlier.unresolved(draft) or _refused_places(draft)


def _refused_places(draft: Draft) -> bool:
    try:
        build_references(draft.spec, draft.config.storage)
    except FinetuneError as error:
        preflight.refuse(draft, Cause(error.failure_class, str(error), error.field))
        return True
    return False


def plan(draft: Draft) -> None:
    """The run is fixed from now on, or the job is Invalid and the message lists what every pool lacks."""
    try:
        planned = _make(draft, draft.config.trainer_image)
    except FinetuneError as error:
        draft.mark(ConditionType.PLANNED, FALSE, error.failure_class, str(error))
        draft.fail(State.INVALID, error.failure_class, str(error), error.field)
        return
    _adopt(draft, planned)


def run_file(draft: Draft) -> str | None:
    """The planned run file, with the digest that the plan names; None while it is being put back.

    A plan file that is gone or edited is written anew. Where it cannot come out the same (a pool was edited, the
    operator is another release), the run is planned anew if no attempt was ever started, else the job fails.
    """
    file, fixed = draft.seen.plan_file, draft.status.plan
    assert fixed is not None, "only a planned job has a run file"
    if file is not None and file.text is not None and _digest(file.text) == fixed.run_digest:
        return file.text
    try:
        planned = _make(draft, fixed.trainer_image)
    except FinetuneError as error:
        _lost(draft, f"the ConfigMap of the plan is lost and the run cannot be planned again: {error}")
        return None
    if planned.plan.run_digest == fixed.run_digest:
        if _blocked(draft, planned):
            return None
        if file is not None:
            draft.do(Delete("ConfigMap", _name(draft, planned), file.uid))
        draft.do(Create(plan_config_map(draft.seen.job, planned.run)))
    elif draft.status.attempt is None:
        _adopt(draft, planned)
    else:
        _lost(draft, "the ConfigMap of the plan is lost or edited, and planning again gives another run")
    return None


def _blocked(draft: Draft, planned: Planned) -> bool:
    cause = draft.obstacle(_name(draft, planned))
    if cause is not None:
        draft.mark(ConditionType.QUEUED, TRUE, cause.failure_class, cause.message)
        draft.be(State.QUEUED, f"the run file cannot be stored: {cause.message}")
        draft.look(draft.config.retry_base_seconds)
    return cause is not None


def _make(draft: Draft, trainer_image: str) -> Planned:
    job, found = draft.seen.job, draft.status.preflight
    if found is None:
        raise FinetuneError("what preflight found is gone from status.preflight")
    return make_plan(
        draft.spec,
        RunJob(name=job.name, namespace=job.namespace, uid=job.uid),
        found,
        build_references(draft.spec, draft.config.storage),
        draft.seen.pools,
        trainer_image,
    )


def _adopt(draft: Draft, planned: Planned) -> None:
    chosen = planned.plan
    draft.set(plan=chosen, failure=None, failures=None, next_attempt_time=None)
    draft.set(preflight_failures={}, interruptions_without_checkpoint=None)  # those of preflight
    draft.mark(ConditionType.VALIDATED, TRUE, "PreflightPassed", _kept_message(draft))
    draft.mark(ConditionType.PLANNED, TRUE, "Planned", _summary(chosen))
    draft.be(State.QUEUED, f"planned on {chosen.pool}")


def _kept_message(draft: Draft) -> str:
    found = draft.seen.status.condition(ConditionType.VALIDATED)
    return found.message if found is not None else ""


def _summary(chosen: Plan) -> str:
    return (
        f"{chosen.nodes} × {chosen.gpus_per_node} on pool {chosen.pool} ({chosen.pool_reason}), "
        f"{chosen.total_steps} steps, about {chosen.memory.total_gib:.1f} GiB per GPU"
    )


def _lost(draft: Draft, message: str) -> None:
    draft.fail(State.FAILED, "Internal", f"{message}; clone the job to run it again, checkpoints are kept")
    history.account_for_rest(draft)
    draft.set(current=None, next_attempt_time=None, completion_time=draft.now)


def _name(draft: Draft, planned: Planned) -> str:
    return str(plan_config_map(draft.seen.job, planned.run)["metadata"]["name"])


def _digest(text: str) -> str | None:
    """Of the JSON as it is stored: a field that a later release adds has a default there and is no part of it."""
    try:
        value = json.loads(text)
        RunFile.from_json(value)
        return digest(value)
    except (ValueError, ValidationError):
        return None
