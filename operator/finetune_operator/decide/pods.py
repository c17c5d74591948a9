"""Pods that outlive their attempt: whether they still hold resources, and whether their node is lost."""

from __future__ import annotations

from datetime import timedelta

from finetune_api import naming
from finetune_operator.decide.draft import Draft
from finetune_operator.snapshot import PodView


def waits_for_pods(draft: Draft) -> bool:
    """Whether pods of an attempt that is over still hold resources on nodes that answer; looks again if so."""
    jobs = {child.uid for child in draft.seen.attempts if not child.deleting and child.finished is None}
    left = [
        pod
        for pod in draft.seen.pods
        if pod.role == naming.ROLE_TRAINER and pod.job_uid not in jobs and not pod.over and not is_lost(draft, pod)
    ]
    if left:
        draft.look(draft.config.poll_seconds)
    return bool(left)


def is_lost(draft: Draft, pod: PodView) -> bool:
    """Whether the pod is being deleted, past its grace, on a node that does not answer."""
    if pod.deletion_time is None or pod.node not in draft.seen.unreachable_nodes:
        return False
    return draft.seen.now > pod.deletion_time + timedelta(seconds=draft.config.node_lost_seconds)
