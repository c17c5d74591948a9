"""A released attempt: whether its gang is whole, what it does, and whether a node was lost under it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.failures import TABLE
from finetune_api.status import ConditionType, Current, State
from finetune_operator.clock import format_time
from finetune_operator.decide import guarding, speed, stopping
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import FALSE, TRUE
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.evidence import lost_node
from finetune_operator.decide.obstacles import why_not_running
from finetune_operator.decide.pods import is_lost
from finetune_operator.snapshot import ChildJob, PodView

_STAGES = {"Evaluating": State.EVALUATING, "Publishing": State.PUBLISHING}


def watch(draft: Draft, current: Current, child: ChildJob) -> None:
    """Says how far the attempt is; asks for its end where a node is lost or the start takes too long."""
    plan = draft.status.plan
    assert plan is not None, "only a planned job has attempts"
    pods = draft.seen.pods_of(child.uid)
    lost = next((pod for pod in pods if is_lost(draft, pod)), None)
    if lost is not None:
        _stop_for_lost_node(draft, current, lost)
        return
    current = _remember_lost_node(draft, current, pods)
    _mark_scheduled(draft, pods, plan.nodes)
    if any(pod.deletion_time is not None for pod in pods):
        draft.look(draft.config.poll_seconds)
    if sum(pod.running for pod in pods) == plan.nodes:
        _whole(draft, current, pods, plan.pool)
    elif current.running_time is None:
        _start_up(draft, current, child, pods, plan.nodes)
    _note_times(draft, current, pods, plan.nodes)
    _mark_checkpoint(draft, current)
    guarding.tell(draft, current)


def _remember_lost_node(draft: Draft, current: Current, pods: Sequence[PodView]) -> Current:
    """Writes down that a node is lost: its pod may be gone when the Job has failed, and the node may be back."""
    if current.avoid_node is not None or (node := lost_node(pods, draft.seen.unreachable_nodes)) is None:
        return current
    current = current.model_copy(update={"avoid_node": node})
    draft.set(current=current)
    return current


def _note_times(draft: Draft, current: Current, pods: Sequence[PodView], nodes: int) -> None:
    """Writes down when all pods had a node, and when all ran."""
    changes: dict[str, str] = {}
    placed = [pod for pod in pods if pod.node is not None]
    if current.scheduled_time is None and len(placed) == nodes:
        changes["scheduled_time"] = format_time(max(pod.scheduled or draft.seen.now for pod in placed))
    if current.running_time is None and sum(pod.running for pod in pods) == nodes:
        changes["running_time"] = draft.now
        draft.set(start_time=draft.seen.status.start_time or draft.now)
    now_known = draft.status.current
    if changes and now_known is not None:
        draft.set(current=now_known.model_copy(update=changes))


def _whole(draft: Draft, current: Current, pods: Sequence[PodView], pool: str) -> None:
    slow = speed.why_slow(draft, current)
    if slow is not None:
        draft.mark(ConditionType.TRAINING, TRUE, speed.SLOWER, slow)
    else:
        draft.mark(ConditionType.TRAINING, TRUE, "PodsRunning", f"attempt {current.number} runs on {pool}")
    progress = draft.seen.status.progress
    stage = progress.stage if progress is not None and progress.attempt == current.number else ""
    count = "1 pod" if len(pods) == 1 else f"{len(pods)} pods"
    draft.be(_STAGES.get(stage, State.TRAINING), f"attempt {current.number} runs with {count} on {pool}")


def _start_up(draft: Draft, current: Current, child: ChildJob, pods: Sequence[PodView], nodes: int) -> None:
    cause = why_not_running(draft.seen, child, pods, nodes)
    plan = draft.status.plan
    pool = draft.seen.pool(plan.pool) if plan is not None else None
    if pool is not None:
        waited = child.waited(draft.seen.now)
        left = pool.spec.start_timeout_seconds - waited
        if left <= 0:
            _give_up(draft, current, cause, waited)
            return
        draft.look(min(left, draft.config.poll_seconds))
    running = sum(pod.running for pod in pods)
    if cause is not None:
        draft.mark(ConditionType.TRAINING, FALSE, cause.failure_class, cause.message)
        draft.be(State.STARTING, f"attempt {current.number} cannot start yet: {cause.message}")
    else:
        draft.mark(ConditionType.TRAINING, FALSE, "Starting", f"{running} of {nodes} pods run")
        draft.be(State.STARTING, f"attempt {current.number} starts: {running} of {nodes} pods run")


def _give_up(draft: Draft, current: Current, cause: Cause | None, waited: float) -> None:
    why = cause or Cause("Unschedulable", "its pods did not all start")
    message = f"attempt {current.number} was not whole after {waited:.0f} s: {why.message}"
    draft.record_failure(why.failure_class, message, why.field)
    if TABLE[why.failure_class].avoids_node:
        current = current.model_copy(update={"avoid_node": why.node})
    stopping.begin(draft, current, why.failure_class, message)


def _stop_for_lost_node(draft: Draft, current: Current, pod: PodView) -> None:
    message = f"node {pod.node} stopped answering while pod {pod.name} was on it"
    draft.record_failure("NodeLost", message)
    stopping.begin(draft, current.model_copy(update={"avoid_node": pod.node}), "NodeLost", message)


def _mark_scheduled(draft: Draft, pods: Sequence[PodView], nodes: int) -> None:
    placed = [pod for pod in pods if pod.node is not None]
    if len(placed) == nodes:
        names = ", ".join(sorted({str(pod.node) for pod in placed})[:8])
        draft.mark(ConditionType.SCHEDULED, TRUE, "PodsScheduled", f"on {names}")
        return
    waiting = next((pod.unschedulable for pod in pods if pod.unschedulable), "")
    reason = "Unschedulable" if waiting else "Waiting"
    draft.mark(ConditionType.SCHEDULED, FALSE, reason, waiting or f"{len(placed)} of {nodes} pods have a node")


def _mark_checkpoint(draft: Draft, current: Current) -> None:
    progress = draft.seen.status.progress
    if progress is not None and progress.attempt == current.number and progress.checkpoint_step is not None:
        draft.mark(ConditionType.CHECKPOINTED, TRUE, "Committed", f"at step {progress.checkpoint_step}")
