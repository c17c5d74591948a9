"""Reads the API into a snapshot. Every read goes to the API server, so that no stale cache is ever acted on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from finetune_api import naming
from finetune_api.planner import Pool, named_jobs
from finetune_api.pool import GPUPoolSpec
from finetune_api.status import ConditionType
from finetune_operator.clock import parse_time
from finetune_operator.config import Config
from finetune_operator.kube import Body, Kube, NotFound
from finetune_operator.render.plan import RUN_FILE_KEY
from finetune_operator.snapshot import ChildJob, JobView, PlanFile, PodView, Snapshot, WarningEvent
from finetune_operator.views import child_job, controller_uid, job_view, pod_view

PODS_ASKED_ABOUT = 4  # pods of one gang fail to start for the same reason
OLDEST_MOUNT_WARNING = timedelta(seconds=150)  # the kubelet repeats a failed mount at least every two minutes


async def observe(kube: Kube, key: str, config: Config) -> Snapshot | None:
    """Everything that a decision about the job needs, the time included; None where the job does not exist."""
    namespace, name = key.split("/", 1)
    try:
        job = job_view(await kube.get("FineTuneJob", name, namespace))
    except NotFound:
        return None
    children, pods, pools, plan_file, earlier = await asyncio.gather(
        _children(kube, job), _pods(kube, job), _pools(kube, job), _plan_file(kube, job), _named_jobs(kube, job)
    )
    current = job.status.current
    own = {child.uid for child in children} | {current.job_uid if current is not None else None}
    known = tuple(pod for pod in pods if pod.job_uid in own or _is_leftover(job, pod))
    now = datetime.now(UTC)
    warnings, unreachable = await asyncio.gather(
        _warnings(kube, namespace, children, known, now), _unreachable(kube, known, now, config)
    )
    return Snapshot(
        now=now,
        job=job,
        pools=pools,
        preflights=tuple(child for child in children if child.role == naming.ROLE_PREFLIGHT),
        attempts=tuple(child for child in children if child.role == naming.ROLE_TRAINER),
        pods=known,
        plan_file=plan_file,
        warnings=warnings,
        unreachable_nodes=unreachable,
        named_jobs=earlier,
    )


def _selector(job: JobView) -> str:
    managed = ",".join(f"{key}={value}" for key, value in naming.MANAGED_BY.items())
    return f"{managed},{naming.LABEL_JOB_UID}={job.uid}"


def _is_leftover(job: JobView, pod: PodView) -> bool:
    """A pod of an attempt whose Job is gone. Its name tells: labels alone could be anybody's."""
    return pod.name.startswith(f"{job.name}-{naming.uid5(job.uid)}-") and pod.deletion_time is not None


async def _children(kube: Kube, job: JobView) -> tuple[ChildJob, ...]:
    bodies = await kube.list("Job", job.namespace, labels=_selector(job))
    views = (child_job(body) for body in bodies if controller_uid(body) == job.uid)
    return tuple(sorted((view for view in views if view is not None), key=lambda view: (view.role, view.number)))


async def _pods(kube: Kube, job: JobView) -> tuple[PodView, ...]:
    return tuple(pod_view(body) for body in await kube.list("Pod", job.namespace, labels=_selector(job)))


async def _pools(kube: Kube, job: JobView) -> tuple[Pool, ...]:
    if _is_over(job):
        return ()
    found = []
    for body in await kube.list("GPUPool"):
        try:
            found.append(Pool(body["metadata"]["name"], GPUPoolSpec.from_json(body["spec"])))
        except ValidationError:
            continue  # a pool of another release; the pool's own condition says so
    return tuple(sorted(found, key=lambda pool: pool.name))


async def _plan_file(kube: Kube, job: JobView) -> PlanFile | None:
    current = job.status.current
    if job.status.plan is None or _is_over(job) or (current is not None and current.released):
        return None
    try:
        body = await kube.get("ConfigMap", naming.plan_name(job.name, job.uid), job.namespace)
    except NotFound:
        return None
    if controller_uid(body) != job.uid:
        return None
    return PlanFile(uid=body["metadata"]["uid"], text=(body.get("data") or {}).get(RUN_FILE_KEY))


async def _named_jobs(kube: Kube, job: JobView) -> tuple[JobView, ...]:
    """The jobs that the spec names by fromJob, until what they stand for is in status."""
    if job.spec is None or job.deleting or job.status.plan is not None:
        return ()
    known = {item.field for item in job.status.resolved}
    wanted = {name for path, name in named_jobs(job.spec).items() if path not in known}
    found = []
    for name in sorted(wanted):
        try:
            found.append(job_view(await kube.get("FineTuneJob", name, job.namespace)))
        except NotFound:
            continue
    return tuple(found)


def _is_over(job: JobView) -> bool:
    return job.deleting or (job.status.plan is not None and job.status.is_true(ConditionType.FINISHED))


async def _warnings(
    kube: Kube, namespace: str, children: Iterable[ChildJob], pods: tuple[PodView, ...], now: datetime
) -> tuple[WarningEvent, ...]:
    """Warning events about Jobs that are starting up and about their pods."""
    uids: list[str] = []
    for child in children:
        if child.finished is not None or child.suspended or child.deleting:
            continue
        own = [pod for pod in pods if pod.job_uid == child.uid]
        if own and all(pod.phase != "Pending" for pod in own):
            continue
        uids += [child.uid, *(pod.uid for pod in own if pod.phase == "Pending")][: PODS_ASKED_ABOUT + 1]
    pages = await asyncio.gather(
        *(kube.list("Event", namespace, fields=f"involvedObject.uid={uid},type=Warning") for uid in uids)
    )
    return tuple(
        WarningEvent(uid, str(body.get("reason") or ""), str(body.get("message") or ""))
        for uid, page in zip(uids, pages, strict=True)
        for body in page
        if not _is_stale(body, now)
    )


def _is_stale(event: Body, now: datetime) -> bool:
    seen = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    return event.get("reason") == "FailedMount" and now - parse_time(seen) > OLDEST_MOUNT_WARNING


async def _unreachable(kube: Kube, pods: Sequence[PodView], now: datetime, config: Config) -> frozenset[str]:
    """Nodes that are gone or not ready, among those with a pod that should be gone by now or whose gang has failed."""
    grace = timedelta(seconds=config.node_lost_seconds)
    failed = {pod.job_uid for pod in pods if pod.phase == "Failed"}
    suspects = {
        pod.node
        for pod in pods
        if pod.node
        and (
            (pod.deletion_time is not None and now > pod.deletion_time + grace)
            or (pod.job_uid in failed and not pod.over)
        )
    }
    ready = await asyncio.gather(*(_is_ready(kube, node) for node in sorted(suspects)))
    return frozenset(node for node, is_ready in zip(sorted(suspects), ready, strict=True) if not is_ready)


async def _is_ready(kube: Kube, name: str) -> bool:
    try:
        node = await kube.get("Node", name)
    except NotFound:
        return False
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
