"""One leader by a Lease. Safe against clocks that differ: only this process's monotonic clock is looked at.

A standby takes the Lease over when its record has not changed for as long as the record itself allows. The holder
renews it, and ends the process when no renewal came through within the renew deadline, which is shorter than the
Lease's duration. Two writers converge anyway; the Lease keeps them from getting in each other's way.
"""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Any

import structlog

from finetune_operator import metrics
from finetune_operator.config import Config
from finetune_operator.kube import ApiError, Body, Conflict, Kube, NotFound

log = structlog.get_logger()


class LeaseLost(Exception):
    """Another process may lead now: nothing may be written any more."""


class Elector:
    """Takes, renews and gives back the Lease. `kube` must have a request limit below the renew deadline."""

    def __init__(self, kube: Kube, config: Config) -> None:
        self._kube = kube
        self._config = config
        self._record: Body | None = None
        self._record_seen_at = 0.0
        self._renewed_at: float | None = None

    @property
    def leads(self) -> bool:
        """Whether the last renewal is recent enough to act upon."""
        if self._renewed_at is None:
            return False
        return time.monotonic() - self._renewed_at < self._config.lease_renew_seconds

    async def acquire(self) -> None:
        """Returns when this process holds the Lease."""
        log.info("waiting_for_lease", lease=self._config.lease_name, namespace=self._config.namespace)
        while not await self._try():  # noqa: ASYNC110  the event that is waited for is on the API server
            await asyncio.sleep(self._config.lease_retry_seconds * (0.8 + 0.4 * random.random()))  # noqa: S311  jitter
        metrics.LEADER.set(1)
        log.info("leading", identity=self._config.identity)

    async def renew(self) -> None:
        """Renews until cancelled; raises LeaseLost when that fails for too long."""
        while True:
            await asyncio.sleep(self._config.lease_retry_seconds)
            await self._try()
            if not self.leads:
                metrics.LEADER.set(0)
                raise LeaseLost(f"no renewal for {self._config.lease_renew_seconds:g} s")

    async def release(self) -> None:
        """Gives the Lease back, so that the next leader need not wait."""
        if self._record is None or not self.leads:
            return
        self._renewed_at = None
        metrics.LEADER.set(0)
        freed = {**self._record["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._kube.replace(self._with_spec(freed))
        except ApiError as error:
            log.warning("lease_not_released", error=str(error))

    async def _try(self) -> bool:
        """Takes or renews the Lease if it is free or ours; whether it is ours now."""
        started = time.monotonic()  # the Lease counts from before the request, whenever the answer comes
        try:
            taken = await self._take()
        except ApiError as error:
            log.warning("lease_request_failed", error=str(error))
            return False
        if taken:
            self._renewed_at = started
        return taken

    async def _take(self) -> bool:
        try:
            found = await self._kube.get("Lease", self._config.lease_name, self._config.namespace)
        except NotFound:
            return await self._create()
        if self._record is None or found["spec"] != self._record["spec"]:
            self._record_seen_at = time.monotonic()
        self._record = found
        spec = found["spec"]
        holder = spec.get("holderIdentity") or ""
        mine = holder == self._config.identity
        patience = float(spec.get("leaseDurationSeconds") or self._config.lease_duration_seconds)
        if holder and not mine and time.monotonic() - self._record_seen_at < patience:
            return False
        return await self._write(self._spec(spec, takes_over=not mine))

    async def _create(self) -> bool:
        metadata = {"name": self._config.lease_name, "namespace": self._config.namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}
        try:
            self._record = await self._kube.create({**body, "spec": self._spec({}, takes_over=True)})
        except Conflict:
            return False
        return True

    async def _write(self, spec: dict[str, Any]) -> bool:
        try:
            self._record = await self._kube.replace(self._with_spec(spec))
        except Conflict:
            return False
        self._record_seen_at = time.monotonic()
        return True

    def _with_spec(self, spec: dict[str, Any]) -> Body:
        assert self._record is not None, "the Lease was read before"
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": self._record["metadata"],
            "spec": spec,
        }

    def _spec(self, before: Body, *, takes_over: bool) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._config.identity,
            "leaseDurationSeconds": max(1, round(self._config.lease_duration_seconds)),
            "acquireTime": now if takes_over else before.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (1 if takes_over else 0),
        }
