"""The attempt under way: create, release, watch, and what it means when it is gone or over.

Order of the intent protocol: number in status → Job created suspended → its UID in status → run file, Service and
NetworkPolicy → released. A Job whose UID is not in status has never run a pod, so creating it again is harmless.
"""

from __future__ import annotations

from finetune_api import naming
from finetune_api.planner import build_references
from finetune_api.status import ConditionType, Current, State
from finetune_operator.actions import Create, Release
from finetune_operator.decide import ending, planning, running, stopping
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.history import nodes_to_avoid
from finetune_operator.decide.pods import waits_for_pods
from finetune_operator.render import AttemptInput, attempt_children, attempt_job
from finetune_operator.snapshot import ChildJob


def go_on(draft: Draft) -> None:
    """One step further with the attempt whose number is in status.current."""
    current = draft.seen.status.current
    assert current is not None, "there is an attempt under way"
    name = naming.attempt_name(draft.seen.job.name, draft.seen.job.uid, current.number)
    child = draft.seen.attempt(name)
    if current.job_uid is None:
        _create_or_adopt(draft, current, name, child)
    elif child is not None and child.uid == current.job_uid and child.finished is not None:
        ending.finished(draft, current, child)
    elif current.stop_reason is not None:
        stopping.go_on(draft, current, child)
    elif child is None or child.uid != current.job_uid or child.deleting:
        _deleted_by_somebody(draft, current, name)
    elif stopping.begin_if_asked(draft, current):
        pass
    elif not current.released:
        _release(draft, current, child)
    else:
        running.watch(draft, current, child)


def _create_or_adopt(draft: Draft, current: Current, name: str, child: ChildJob | None) -> None:
    if child is not None and not child.deleting:
        draft.set(current=current.model_copy(update={"job_uid": child.uid}))
        return
    if child is not None:
        draft.look(draft.config.poll_seconds)
        return
    if stopping.is_asked_for(draft):
        draft.set(current=None)  # nothing was created, so nothing has to stop
        return
    if _blocked(draft, name):
        return
    attempt = _input(draft, current)
    if attempt is not None:
        draft.do(Create(attempt_job(attempt, draft.config)))


def _blocked(draft: Draft, name: str) -> bool:
    cause = draft.obstacle(name)
    if cause is not None:
        ending.could_not_start(draft, cause)
    return cause is not None


def _release(draft: Draft, current: Current, child: ChildJob) -> None:
    if _blocked(draft, child.name):
        return
    attempt = _input(draft, current)
    if attempt is None:
        return
    draft.do(*(Create(manifest) for manifest in attempt_children(attempt, child, draft.config)))
    draft.do(Release(child.name, child.uid))
    draft.set(current=current.model_copy(update={"released": True}))
    draft.mark(ConditionType.QUEUED, FALSE, "Released", f"attempt {current.number} may start its pods")
    draft.mark(ConditionType.SCHEDULED, FALSE, "Waiting", "no pod has a node yet")
    draft.be(State.STARTING, f"attempt {current.number} waits for its pods")


def _input(draft: Draft, current: Current) -> AttemptInput | None:
    """What the attempt is made of; None while the run file or the pool is missing."""
    plan = draft.status.plan
    assert plan is not None, "only a planned job has attempts"
    text = planning.run_file(draft)
    pool = draft.seen.pool(plan.pool)
    if text is None or pool is None:
        if pool is None:
            draft.mark(ConditionType.QUEUED, TRUE, "Unschedulable", f"the GPUPool {plan.pool} does not exist any more")
        draft.look(draft.config.poll_seconds)
        return None
    return AttemptInput(
        job=draft.seen.job,
        spec=draft.spec,
        plan=plan,
        pool=pool,
        references=build_references(draft.spec, draft.config.storage),
        number=current.number,
        run_file=text,
        avoid_nodes=nodes_to_avoid(draft.seen.status.attempts),
    )


def _deleted_by_somebody(draft: Draft, current: Current, name: str) -> None:
    """The Job whose UID is in status is gone, and nobody asked us: an interruption, once its pods are gone too."""
    if waits_for_pods(draft):
        return
    ending.close(draft, current, Cause("AttemptDeleted", f"the Job {name} was deleted"))
