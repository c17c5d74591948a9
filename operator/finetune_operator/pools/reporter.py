"""Keeps the status of every GPUPool true: on each change that matters, and again at a slow pace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NoReturn

from kubernetes.aio import client
from pydantic import ValidationError

from finetune_api.job import API_VERSION
from finetune_api.pool import GPUPoolSpec, GPUPoolStatus
from finetune_operator.kube import ApiError, Conflict, Kube, NotFound
from finetune_operator.pools.summary import Demand, Node, demand, node, summarize

log = logging.getLogger(__name__)

Body = Mapping[str, Any]
SETTLE_SECONDS = 1.0  # a job that starts changes several times within a second
RETRY_SECONDS = 10.0


class PoolReporter:
    """Owns the status of the GPUPools.

    The watch tells it what it sees (`saw_…`, `gone`); `run` writes until it is cancelled. Each write names the
    resourceVersion that it rests on and is left out where nothing changed.
    """

    def __init__(self, api: client.ApiClient, resync_seconds: float) -> None:
        self._kube = Kube(api)
        self._resync_seconds = resync_seconds
        self._pools: dict[str, Body] = {}
        self._nodes: dict[str, Node] = {}
        self._demands: dict[str, Demand | None] = {}
        self._changed = asyncio.Event()

    def saw_pool(self, body: Body) -> None:
        """A GPUPool was added or changed."""
        self._pools[body["metadata"]["uid"]] = body
        self._changed.set()

    def saw_node(self, body: Body) -> None:
        """A node was added or changed."""
        self._remember(self._nodes, body, node(body))

    def saw_job(self, body: Body) -> None:
        """A FineTuneJob was added or changed, be it in its status only."""
        self._remember(self._demands, body, demand(body))

    def gone(self, body: Body) -> None:
        """A GPUPool, node or FineTuneJob was deleted."""
        self.forget(body["metadata"]["uid"])

    def known(self) -> frozenset[str]:
        """UIDs of all objects that are remembered, for a resync that looks for deletions nobody told of."""
        return frozenset({*self._pools, *self._nodes, *self._demands})

    def forget(self, uid: str) -> None:
        """That object is gone."""
        self._pools.pop(uid, None)
        self._nodes.pop(uid, None)
        self._demands.pop(uid, None)
        self._changed.set()

    async def run(self) -> NoReturn:
        """Write until cancelled."""
        pause = self._resync_seconds
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause)
            await asyncio.sleep(SETTLE_SECONDS)
            self._changed.clear()
            done = [await self._report(uid) for uid in list(self._pools)]
            pause = self._resync_seconds if all(done) else RETRY_SECONDS

    def _remember(self, kind: dict[str, Any], body: Body, value: object) -> None:
        uid = body["metadata"]["uid"]
        if uid not in kind or kind[uid] != value:
            kind[uid] = value
            self._changed.set()

    async def _report(self, uid: str) -> bool:
        """False where the API server did not take the status, so that it has to be tried again."""
        body = self._pools.get(uid)
        if body is None:
            return True
        name = body["metadata"]["name"]
        try:
            spec = GPUPoolSpec.from_json(dict(body["spec"]))
            shown = GPUPoolStatus.from_json(dict(body.get("status") or {}))
        except ValidationError as error:
            log.warning("pool %s cannot be read: %s", name, error.errors(include_input=False, include_url=False)[:3])
            return True
        before = next(iter(shown.conditions), None)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = summarize(
            name,
            spec,
            body["metadata"]["generation"],
            self._nodes.values(),
            [found for found in self._demands.values() if found],
            before,
            now,
        )
        return status == shown or await self._write(uid, body, status)

    async def _write(self, uid: str, body: Body, status: GPUPoolStatus) -> bool:
        name = body["metadata"]["name"]
        meta = {"name": name, "resourceVersion": body["metadata"]["resourceVersion"]}
        wanted = {"apiVersion": API_VERSION, "kind": "GPUPool", "metadata": meta, "status": status.to_json()}
        try:
            after = await self._kube.apply_status(wanted)
        except (Conflict, NotFound):
            return True  # the watch tells of the newer pool, or of its end, and wakes the loop
        except ApiError as error:
            log.warning("status of pool %s is not written: %s", name, error)
            return False
        if uid in self._pools:
            self._pools[uid] = after
        return True
