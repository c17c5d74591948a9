"""Preflight: one small Job per generation of the spec, until the run is planned.

An error of the user ends in state Invalid, until the spec is edited. A fault of the platform is tried again. While the
preflight pod still waits for something that the tenant can create (a secret), the job is Invalid and goes on by itself
once it exists.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api import naming
from finetune_api.failures import MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT, TABLE, Fault
from finetune_api.planner import build_references, spec_digest
from finetune_api.status import ConditionType, Preflight, State
from finetune_operator.actions import Create, Delete, Release
from finetune_operator.clock import after, seconds_until
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE, UNKNOWN
from finetune_operator.decide.documents import INFO, read_preflight
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.evidence import cause_of_failure
from finetune_operator.decide.obstacles import why_not_running
from finetune_operator.decide.pods import is_lost
from finetune_operator.render import preflight_config_map, preflight_job
from finetune_operator.snapshot import ChildJob, PodView


def delete_jobs(draft: Draft, *, keep: str | None = None) -> None:
    """Every preflight Job but the named one goes."""
    draft.do(
        *(
            Delete("Job", child.name, child.uid)
            for child in draft.seen.preflights
            if child.name != keep and not child.deleting
        )
    )


def refused_for_good(draft: Draft) -> bool:
    """Whether this generation of the spec was refused, and nothing under way can change that."""
    finished = draft.seen.status.is_true(ConditionType.FINISHED)
    return finished and not any(child.finished is None for child in _of_this_generation(draft))


def go_on(draft: Draft) -> None:
    """One step further with the preflight of this generation."""
    name = naming.preflight_name(draft.seen.job.name, draft.seen.job.uid, draft.seen.job.generation)
    delete_jobs(draft, keep=name)
    child = next(iter(_of_this_generation(draft)), None)
    if child is None:
        _start(draft, name)
    elif child.deleting:
        draft.look(draft.config.poll_seconds)
    elif child.suspended:
        _release(draft, child)
    elif draft.seen.status.next_attempt_time is not None:
        draft.do(Delete("Job", child.name, child.uid))  # its outcome is counted: make room for the next try
    else:
        _watch(draft, child, draft.seen.pods_of(child.uid))


def _of_this_generation(draft: Draft) -> tuple[ChildJob, ...]:
    return tuple(child for child in draft.seen.preflights if child.number == draft.seen.job.generation)


def _start(draft: Draft, name: str) -> None:
    waits_until = draft.seen.status.next_attempt_time
    if waits_until is not None:
        remaining = seconds_until(waits_until, draft.seen.now)
        if remaining > 0:
            draft.look(remaining)
        else:
            draft.set(next_attempt_time=None)
            draft.be(State.PREFLIGHT, "preflight is tried again")
        return
    if _blocked(draft, name):
        return
    references = build_references(draft.spec, draft.config.storage)
    draft.do(Create(preflight_job(draft.seen.job, draft.spec, references, draft.config)))
    draft.mark(ConditionType.VALIDATED, UNKNOWN, "PreflightRunning")
    draft.be(State.PREFLIGHT, "preflight reads model, data and output")


def _release(draft: Draft, child: ChildJob) -> None:
    if _blocked(draft, child.name):
        return
    references = build_references(draft.spec, draft.config.storage)
    draft.do(
        Create(preflight_config_map(draft.seen.job, draft.spec, references, child)),
        Release(child.name, child.uid),
    )


def _blocked(draft: Draft, name: str) -> bool:
    """Whether the API server would not create the Job or its ConfigMap; says so."""
    cause = draft.obstacle(name)
    if cause is not None:
        _wait_or_refuse(draft, cause)
        draft.look(draft.config.retry_base_seconds)
    return cause is not None


def _watch(draft: Draft, child: ChildJob, pods: Sequence[PodView]) -> None:
    ended = next((pod for pod in pods if pod.ended or pod.over), None)
    lost = next((pod for pod in pods if is_lost(draft, pod)), None)
    if lost is not None:
        _count(draft, Cause("NodeLost", f"node {lost.node} stopped answering while pod {lost.name} was on it"))
    elif ended is not None:
        _take_result(draft, child, ended)
    elif child.finished is not None:
        _count(draft, cause_of_failure(child, pods))
    elif any(pod.deletion_time is not None for pod in pods):
        draft.look(draft.config.poll_seconds)
    elif any(pod.running for pod in pods):
        draft.set(failure=None)
        draft.mark(ConditionType.VALIDATED, UNKNOWN, "PreflightRunning")
        draft.be(State.PREFLIGHT, "preflight reads model, data and output")
    else:
        _wait_for_start(draft, child, pods)


def _wait_for_start(draft: Draft, child: ChildJob, pods: Sequence[PodView]) -> None:
    cause = why_not_running(draft.seen, child, pods, expected=1)
    waited = child.waited(draft.seen.now)
    if waited >= draft.config.preflight_start_seconds and (cause is None or TABLE[cause.failure_class].retriable):
        _count(draft, cause or Cause("Unschedulable", f"the preflight pod did not start within {waited:.0f} s"))
        return
    draft.look(draft.config.poll_seconds)
    if cause is not None:
        _wait_or_refuse(draft, cause)
    else:
        draft.set(failure=None)
        draft.mark(ConditionType.VALIDATED, UNKNOWN, "PreflightRunning")
        draft.be(State.PREFLIGHT, "the preflight pod is starting")


def _wait_or_refuse(draft: Draft, cause: Cause) -> None:
    if TABLE[cause.failure_class].retriable:
        draft.mark(ConditionType.VALIDATED, UNKNOWN, cause.failure_class, cause.message)
        draft.be(State.PREFLIGHT, f"preflight cannot start: {cause.message}")
    else:
        refuse(draft, cause)


def refuse(draft: Draft, cause: Cause) -> None:
    """State Invalid: somebody has to mend what the message names."""
    draft.mark(ConditionType.VALIDATED, FALSE, cause.failure_class, cause.message)
    draft.fail(State.INVALID, cause.failure_class, cause.message, cause.field)


def _take_result(draft: Draft, child: ChildJob, pod: PodView) -> None:
    result = read_preflight(pod.termination_message, spec_digest(draft.spec))
    if result is None:
        cause = cause_of_failure(child, [pod])
        if pod.exit_code == 0:
            cause = Cause("Internal", f"pod {pod.name} ended well but left no result that can be read; see its log")
        _count(draft, cause)
    elif result.ok:
        draft.set(preflight=result, failure=None)
        draft.mark(ConditionType.VALIDATED, TRUE, "PreflightPassed", _found(result))
        draft.be(State.PREFLIGHT, "preflight passed; the run is being planned")
    else:
        draft.set(preflight=result)
        first = next(item for item in result.findings if item.failure_class != INFO)
        _count(draft, Cause(first.failure_class, first.message, first.field))


def _count(draft: Draft, cause: Cause) -> None:
    """A preflight came to nothing: again later where that may help, else Invalid.

    An interruption is no failure, and waiting for room is neither.
    """
    row, status = TABLE[cause.failure_class], draft.seen.status
    failures = (status.failures or 0) + row.counted
    like_this = status.preflight_failures.get(row.name, 0) + row.counted
    interrupted = row.fault == Fault.INTERRUPTION
    in_vain = 0 if row.counted else (status.interruptions_without_checkpoint or 0) + interrupted
    if interrupted and in_vain >= MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT:
        message = f"preflight was interrupted {in_vain} times in a row; the last: {cause.message}"
        refuse(draft, Cause("NoProgress", message))
        return
    if row.counted and (like_this > row.retries or failures > draft.max_failures):
        refuse(draft, cause)
        return
    wait = draft.backoff(max(1, failures, in_vain))
    draft.set(
        failures=failures or None,
        preflight_failures={**status.preflight_failures, **({row.name: like_this} if row.counted else {})},
        interruptions_without_checkpoint=in_vain or None,
        next_attempt_time=after(draft.seen.now, wait),
    )
    draft.record_failure(cause.failure_class, cause.message, cause.field)
    draft.mark(ConditionType.VALIDATED, UNKNOWN, cause.failure_class, cause.message)
    draft.be(State.PREFLIGHT, f"preflight will be tried again: {cause.message}")


def _found(result: Preflight) -> str:
    if result.data is None or result.model is None:
        return ""
    return (
        f"{result.data.rows} records of format {result.data.format}, about {result.data.tokens} tokens; "
        f"{result.model.model_type} with {result.model.parameters / 1e6:.0f} M parameters"
    )
