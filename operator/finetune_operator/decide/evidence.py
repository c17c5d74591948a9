"""How an attempt or a preflight ended: from pods and the Job's own words to a row of the failure table."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from finetune_api.failures import by_exit_code
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.documents import SUCCEEDED, clean, read_termination
from finetune_operator.decide.runtime import has_wrong_architecture, start_failure
from finetune_operator.snapshot import ChildJob, PodView

# What follows from another pod's end, and so never is the cause where there is another.
CONSEQUENCES = ("CollectiveFailed", "Stopped")
# What the others say where a node is lost: a machine that dies resets no connection, so that they fall silent and hang
# long before Kubernetes gives its pod up. The lost node says nothing at all.
_SAID_BY_OTHERS = ("Hang", *CONSEQUENCES)
_BY_CLUSTER = ("Evicted", "NodeLost")
_LOST_NODE = ("DeletionByTaintManager", "DeletionByPodGC")
# The kubelet ended the pod for reasons of its own: node pressure, a critical pod, a node that shuts down, a time limit
# that some policy of the cluster set on the pod (this operator sets none on trainers).
_ENDED_BY_NODE = ("Evicted", "Preempting", "Terminated", "Shutdown", "DeadlineExceeded")
# The kubelet refused the pod that the scheduler gave it.
_REFUSED_BY_NODE = re.compile(r"OutOf|NodeAffinity|TopologyAffinityError|NodeShutdown")
# What a kubelet that was restarted says of a container that ran before; containerd's word for it is Unknown.
_LOST_SIGHT = ("ContainerStatusUnknown", "Unknown")
_NOT_STARTED = ("StartError", "ContainerCannotRun")
_DISK = re.compile(r"ephemeral[- ](local )?storage|emptydir", re.IGNORECASE)
_DISRUPTED = "DisruptionTarget"  # the condition that the Job's failure policy quotes
_EXIT_CODE = re.compile(r"failed with exit code (\d{1,3})\b")
_END_OF_TIME = datetime.max.replace(tzinfo=UTC)
_LAST_WORDS = 300


def cause_of_failure(job: ChildJob, pods: Sequence[PodView], node_lost: str | None = None) -> Cause:
    """The first cause among the pods; without pods, what the Job says about them.

    Where a pod only says what others say of a lost node, the cause is what the cluster did to any of them, whenever
    that was. node_lost: the node that was lost under the attempt, as far as `lost_node` ever told.
    """
    ended = sorted((pod for pod in pods if pod.over or pod.ended), key=lambda pod: pod.exit_time or _END_OF_TIME)
    causes = [found for pod in ended if (found := _cause_in(pod)) is not None]
    told = [found for found in causes if found.failure_class not in CONSEQUENCES] or causes
    first = told[0] if told else _cause_in_job(job)
    if first.failure_class in _SAID_BY_OTHERS:
        return _done_by_cluster(job, causes, node_lost) or first
    return first


def lost_node(pods: Sequence[PodView], unreachable: Collection[str]) -> str | None:
    """The node that was lost under one of the pods, by the pod's own status or because it is not ready under it.

    To be asked while the pods are there. One that is missing when the Job has failed tells nothing: the Job controller
    deletes the other pods of a Job that fails, and they are gone as soon as they have ended, on a good node too.
    """
    for pod in pods:
        if pod.over or pod.ended:
            cause = _cause_in(pod)
            if cause is not None and cause.failure_class == "NodeLost":
                return pod.node
        elif pod.node in unreachable:
            return pod.node
    return None


def _done_by_cluster(job: ChildJob, causes: Sequence[Cause], node_lost: str | None) -> Cause | None:
    found = next((cause for cause in causes if cause.failure_class in _BY_CLUSTER), None)
    if found is None and node_lost is not None:
        return Cause("NodeLost", f"node {node_lost} was lost while a pod of the attempt was on it", node=node_lost)
    if found is None and _DISRUPTED in job.message:
        return _cause_in_job(job)
    return found


def _cause_in(pod: PodView) -> Cause | None:
    if pod.exit_code == 0 and pod.disruption is None:
        return None
    where = f"pod {pod.name}" + (f" on node {pod.node}" if pod.node else "")
    if pod.reason == "Evicted" and _DISK.search(pod.message):
        return Cause("DiskFull", f"{where}: {clean(pod.message)}")
    if pod.disruption is not None:
        kind = "NodeLost" if pod.disruption in _LOST_NODE else "Evicted"
        return Cause(kind, f"{where} was disrupted: {pod.disruption}", node=pod.node)
    said = read_termination(pod.termination_message)
    if said is not None and said.outcome != SUCCEEDED:
        return Cause(said.outcome, said.message, said.field, pod.node)
    return _cause_by_reason(pod, where) or _cause_by_code(pod, where)


def _cause_by_reason(pod: PodView, where: str) -> Cause | None:
    if pod.exit_reason == "OOMKilled":
        return Cause("OutOfHostMemory", f"{where} was killed for using more memory than its limit")
    if pod.exit_reason in _LOST_SIGHT:
        return Cause("NodeLost", f"{where}: the node restarted or lost sight of the container", node=pod.node)
    if pod.exit_reason in _NOT_STARTED:
        return start_failure(pod.termination_message, where, pod.node)
    if pod.reason in _ENDED_BY_NODE:
        return Cause("Evicted", f"{where}: {pod.reason}: {clean(pod.message)}", node=pod.node)
    if pod.reason == "UnexpectedAdmissionError":
        return Cause("AcceleratorMismatch", f"{where}: {clean(pod.message)}", node=pod.node)
    if _REFUSED_BY_NODE.match(pod.reason):
        return Cause("Unschedulable", f"{where} was refused by its node: {clean(pod.message) or pod.reason}")
    return None


def _cause_by_code(pod: PodView, where: str) -> Cause:
    if pod.exit_code is None:
        return Cause("Unknown", f"{where} failed: {pod.reason or 'no reason given'} {clean(pod.message)}".strip())
    last_words = " ".join(clean(pod.termination_message).split())[-_LAST_WORDS:]
    row = by_exit_code(pod.exit_code)
    if row.exit_code is None and has_wrong_architecture(last_words):
        return start_failure(last_words, where, pod.node)
    reason = f", {pod.exit_reason}" if pod.exit_reason else ""
    log = f"; the end of its log: {last_words}" if last_words else "; see its log"
    return Cause(
        row.name, f"{where} ended with exit code {pod.exit_code}{reason} and left no message{log}", node=pod.node
    )


def _cause_in_job(job: ChildJob) -> Cause:
    message = clean(job.message)
    if job.reason == "DeadlineExceeded":
        return Cause("Hang", f"Job {job.name} did not end in time: {message}")
    if _DISRUPTED in message:
        return Cause("Evicted", message)
    if found := _EXIT_CODE.search(message):
        return Cause(by_exit_code(int(found.group(1))).name, message)
    if job.reason == "BackoffLimitExceeded":  # a pod that ends by itself stays as long as its Job
        return Cause("AttemptDeleted", f"the pods of Job {job.name} were deleted by force and left no trace")
    return Cause("Unknown", f"Job {job.name} failed and its pods are gone: {job.reason} {message}".strip())
