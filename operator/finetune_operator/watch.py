"""Watches the API and wakes jobs. The only file that knows kopf: event handlers that put keys on the queue.

Nothing here decides or writes. A missed event is made good by the full resync.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kopf

from finetune_api import naming
from finetune_api.job import GROUP, VERSION
from finetune_operator.config import Config
from finetune_operator.health import Health
from finetune_operator.kube import Kube, in_cluster
from finetune_operator.pools import PoolReporter
from finetune_operator.progress import Poller
from finetune_operator.queue import KeyedQueue
from finetune_operator.views import child_job, controller_uid, pod_view

Body = Mapping[str, Any]
MANAGED = ",".join(f"{key}={value}" for key, value in naming.MANAGED_BY.items())
SERVER_SECONDS = 290
CLIENT_SECONDS = 300
PAGE = 500
RESYNC_SPREAD = 0.05  # share of the resync interval over which its keys are spread


@dataclass
class Watcher:
    """Hands on what the watches tell: keys to the queue, sights to the poller and the pool reporter."""

    kube: Kube
    config: Config
    queue: KeyedQueue
    poller: Poller
    pools: PoolReporter
    health: Health
    _last: dict[str, object] = field(default_factory=dict)
    """uid -> what of the object was looked at last time; an event that changes nothing of it wakes nobody."""
    _jobs: dict[str, str] = field(default_factory=dict)
    """uid -> key of every FineTuneJob."""

    async def run(self, started: asyncio.Event) -> None:
        """Watches until cancelled; sets `started` when it does; raises where a watch breaks for good."""
        await kopf.operator(
            ready_flag=started,
            registry=self._registry(),
            settings=_settings(self.config),
            standalone=True,
            clusterwide=not self.config.watch_namespaces,
            namespaces=[*self.config.watch_namespaces, self.config.namespace] if self.config.watch_namespaces else (),
        )

    async def resync(self) -> None:
        """Wakes every job, and forgets objects whose deletion nobody told of."""
        known = self.poller.known() | self.pools.known()
        listed: set[str] = set()
        for kind, labels in (("Job", MANAGED), ("Pod", MANAGED)):
            for body in await self._list(kind, labels):
                listed.add(body["metadata"]["uid"])
        for kind in ("GPUPool", "Node"):
            listed |= {body["metadata"]["uid"] for body in await self.kube.list(kind)}
        jobs = {body["metadata"]["uid"]: _key(body) for body in await self._list("FineTuneJob", None)}
        for uid in known - listed - set(jobs):
            self.poller.forget(uid)
            self.pools.forget(uid)
        for uid in set(self._last) - listed - set(jobs):
            del self._last[uid]
        self._jobs = jobs
        for key in jobs.values():
            spread = self.config.resync_seconds * RESYNC_SPREAD
            self.queue.add_after(key, spread * random.random())  # noqa: S311  spreads load, guards nothing

    async def _list(self, kind: str, labels: str | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for namespace in self.config.watch_namespaces or (None,):
            found += await self.kube.list(kind, namespace, labels=labels)
        return found

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        handlers: tuple[tuple[str, str, str, Callable[[str | None, Body], None]], ...] = (
            (GROUP, VERSION, "finetunejobs", self._on_job),
            (GROUP, VERSION, "gpupools", self._on_pool),
            ("batch", "v1", "jobs", self._on_child),
            ("", "v1", "pods", self._on_pod),
            ("", "v1", "nodes", self._on_node),
            ("coordination.k8s.io", "v1", "leases", self._on_lease),
        )
        for group, version, plural, handler in handlers:
            kopf.on.event(group, version, plural, id=plural, registry=registry)(_handler(handler))
        return registry

    def _on_job(self, kind: str | None, body: Body) -> None:
        if not self._is_ours(body):
            return
        uid = body["metadata"]["uid"]
        if kind == "DELETED":
            self.poller.gone(body)
            self.pools.gone(body)
            self._jobs.pop(uid, None)
        else:
            self.poller.saw_job(body)
            self.pools.saw_job(body)
            self._jobs[uid] = _key(body)
        progress = (body.get("status") or {}).get("progress") or {}
        looked_at = (
            body["metadata"].get("generation"),
            "deletionTimestamp" in body["metadata"],
            progress.get("attempt"),
            progress.get("stage"),
            progress.get("checkpointStep"),
            progress.get("percent"),
            progress.get("rollbacks"),
            progress.get("microBatchSize"),
        )
        self._wake(kind, uid, looked_at, _key(body))

    def _on_child(self, kind: str | None, body: Body) -> None:
        if not self._is_ours(body):
            return
        if kind == "DELETED":
            self.poller.gone(body)
        elif _role(body) == naming.ROLE_TRAINER:
            self.poller.saw_attempt(body)
        self._wake_owner(kind, body, (child_job(body), controller_uid(body)))

    def _on_pod(self, kind: str | None, body: Body) -> None:
        if not self._is_ours(body):
            return
        if kind == "DELETED":
            self.poller.gone(body)
        elif _role(body) == naming.ROLE_TRAINER:
            self.poller.saw_pod(body)
        self._wake_owner(kind, body, pod_view(body))

    def _on_pool(self, kind: str | None, body: Body) -> None:
        if kind == "DELETED":
            self.pools.gone(body)
        else:
            self.pools.saw_pool(body)
        uid, generation = body["metadata"]["uid"], body["metadata"].get("generation")
        if kind == "DELETED" or self._last.get(uid) != generation:
            self._last[uid] = generation
            for key in self._jobs.values():
                self.queue.add(key)

    def _on_node(self, kind: str | None, body: Body) -> None:
        if kind == "DELETED":
            self.pools.gone(body)
        else:
            self.pools.saw_node(body)

    def _on_lease(self, kind: str | None, body: Body) -> None:
        mine = (body.get("spec") or {}).get("holderIdentity") == self.config.identity
        if kind != "DELETED" and mine and body["metadata"]["namespace"] == self.config.namespace:
            self.health.saw_renewal()

    def _wake_owner(self, kind: str | None, body: Body, looked_at: object) -> None:
        name = (body["metadata"].get("labels") or {}).get(naming.LABEL_JOB)
        if name:
            key = f"{body['metadata']['namespace']}/{name}"
            self._wake(kind, body["metadata"]["uid"], looked_at, key)

    def _wake(self, kind: str | None, uid: str, looked_at: object, key: str) -> None:
        if kind == "DELETED":
            self._last.pop(uid, None)
        elif self._last.get(uid) == looked_at:
            return
        else:
            self._last[uid] = looked_at
        self.queue.add(key)

    def _is_ours(self, body: Body) -> bool:
        namespaces = self.config.watch_namespaces
        return not namespaces or body["metadata"]["namespace"] in namespaces


def _handler(see: Callable[[str | None, Body], None]) -> Callable[..., Awaitable[None]]:
    async def handle(type: str | None, body: Body, **_: Any) -> None:
        see(type, dict(body))

    return handle


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    if in_cluster():
        return kopf.login_with_service_account(**arguments)
    return kopf.login_with_kubeconfig(**arguments)


def _settings(config: Config) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.server_timeout = SERVER_SECONDS
    settings.watching.client_timeout = CLIENT_SECONDS
    settings.watching.chunk_size = PAGE
    settings.watching.label_selectors["batch", "v1", "jobs"] = MANAGED
    settings.watching.label_selectors["", "v1", "pods"] = MANAGED
    settings.watching.field_selectors["coordination.k8s.io", "v1", "leases"] = f"metadata.name={config.lease_name}"
    return settings


def _key(body: Body) -> str:
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def _role(body: Body) -> str | None:
    role = (body["metadata"].get("labels") or {}).get(naming.LABEL_ROLE)
    return str(role) if role is not None else None
