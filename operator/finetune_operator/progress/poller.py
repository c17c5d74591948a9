"""The loop of the poller: one question at a time is started, answers are awaited side by side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NoReturn

import aiohttp
from kubernetes.aio import client

from finetune_api import naming
from finetune_api.job import API_VERSION
from finetune_api.status import Progress
from finetune_operator.kube import ApiError, Conflict, Kube, NotFound
from finetune_operator.progress import document, text
from finetune_operator.progress.schedule import ProgressSettings, Schedule
from finetune_operator.progress.sightings import Body, Sightings, Target

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5


class Poller:
    """Keeps `status.progress` of every running job at most an interval old; owns that field and no other.

    The watch tells it what it sees (`saw_…`, `gone`); `run` asks and writes until it is cancelled. A crash or a second
    poller does no harm: each write names the resourceVersion that it rests on.
    """

    def __init__(self, api: client.ApiClient, settings: ProgressSettings, port: int = naming.PROGRESS_PORT) -> None:
        self._kube = Kube(api)
        self._settings = settings
        self._port = port
        self._seen = Sightings()
        self._schedule = Schedule(settings)
        self._woken = asyncio.Event()

    def saw_job(self, body: Body) -> None:
        """A FineTuneJob was added or changed, be it in its status only."""
        self._ask(self._seen.saw_job(body))

    def saw_attempt(self, body: Body) -> None:
        """A batch Job with our label was added or changed."""
        self._ask(self._seen.saw_attempt(body))

    def saw_pod(self, body: Body) -> None:
        """A pod with our label was added or changed."""
        self._ask(self._seen.saw_pod(body))

    def gone(self, body: Body) -> None:
        """A FineTuneJob, batch Job or pod was deleted."""
        self._seen.forget(body["metadata"]["uid"])

    def known(self) -> frozenset[str]:
        """UIDs of all objects that are remembered, for a resync that looks for deletions nobody told of."""
        return self._seen.known()

    def forget(self, uid: str) -> None:
        """A resync found that this object is gone."""
        self._seen.forget(uid)

    async def run(self) -> NoReturn:
        """Ask and write until cancelled."""
        async with document.open_session() as session, asyncio.TaskGroup() as questions:
            while True:
                key = self._schedule.next(time.monotonic())
                if key is None:
                    await self._rest()
                    continue
                questions.create_task(self._visit(session, key))
                await asyncio.sleep(1 / self._settings.writes_per_second)

    def _ask(self, pod_uids: Iterable[str]) -> None:
        for uid in pod_uids:
            self._schedule.want(uid, time.monotonic())
            self._woken.set()

    async def _rest(self) -> None:
        self._woken.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), self._schedule.wait(time.monotonic()))

    async def _visit(self, session: aiohttp.ClientSession, key: str) -> None:
        started = time.monotonic()
        target = self._seen.target(key)
        if target is None:
            self._schedule.drop(key)
            return
        try:
            settled = await self._bring_up_to_date(session, target)
        except document.NoProgress as error:
            log.info("no progress from %s/%s attempt %d: %s", target.namespace, target.name, target.attempt, error)
            settled = True
        except ApiError as error:
            log.warning("progress of %s/%s is not written: %s", target.namespace, target.name, error)
            settled = False
        if settled and target.termination is not None:
            self._schedule.drop(key)
            return
        if not settled:
            self._schedule.want(key, started + RETRY_SECONDS)
        self._schedule.done(key, started)
        self._woken.set()

    async def _bring_up_to_date(self, session: aiohttp.ClientSession, target: Target) -> bool:
        """True where status says what the pod says; False where status moved on meanwhile."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if target.termination is None:
            said = await document.read(session, target.address, self._port, target.attempt)
            progress: Progress | None = text.running(said, now, target.planned_batch)
        else:
            message = document.parse_termination(target.termination)
            progress = text.ended(message, target.attempt, target.total_steps, target.shown, now)
        if progress is None or text.same(target.shown, progress):
            return True
        return await self._write(target, progress)

    async def _write(self, target: Target, progress: Progress) -> bool:
        """False where the job changed since it was seen."""
        meta = {"name": target.name, "namespace": target.namespace, "resourceVersion": target.resource_version}
        body = {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "metadata": meta,
            "status": {"progress": progress.to_json()},
        }
        try:
            after = await self._kube.apply_status(body, naming.MANAGER_PROGRESS)
        except Conflict:
            return False
        except NotFound:
            self._seen.forget(target.uid)
            return True
        if after["metadata"]["uid"] == target.uid:  # the next write rests on this one before the watch has told of it
            self._seen.saw_job(after)
        return True
