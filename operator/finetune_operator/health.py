"""/healthz and /metrics.

A watch can be dead while its process looks well. So /healthz of the leader asks for a proof: the renewal of our own
Lease must have come back through a watch lately. And it asks whether the event loop keeps up.
"""

from __future__ import annotations

import asyncio
import time

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator import metrics

log = structlog.get_logger()

WATCH_SECONDS = 30.0
START_SECONDS = 60.0  # from the first look at all objects until the watch of the Lease tells of a renewal
MOST_LAG_SECONDS = 5.0
TICK_SECONDS = 1.0


class Health:
    """What the probe rests on. `saw_renewal` is called by the watch, `leading` once when this process leads."""

    def __init__(self) -> None:
        self._lag = 0.0
        self._leading_since: float | None = None
        self._renewal_seen_at: float | None = None

    def leading(self) -> None:
        """From now on the watches must prove that they live."""
        self._leading_since = time.monotonic()

    def saw_renewal(self) -> None:
        """The watch told of a renewal of our own Lease."""
        self._renewal_seen_at = time.monotonic()

    def problem(self) -> str | None:
        """What is wrong; None where all is well."""
        if self._lag > MOST_LAG_SECONDS:
            return f"the event loop is {self._lag:.1f} s late"
        if self._leading_since is None:
            return None
        now = time.monotonic()
        if self._renewal_seen_at is None:
            waited = now - self._leading_since
            return None if waited < START_SECONDS else f"no watch has told of our Lease for {waited:.0f} s"
        silent = now - self._renewal_seen_at
        return None if silent < WATCH_SECONDS else f"no watch has told of our Lease for {silent:.0f} s"

    async def measure(self) -> None:
        """Measures the event loop's lag until cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            self._lag = max(0.0, time.monotonic() - before - TICK_SECONDS)
            metrics.LOOP_LAG.set(self._lag)


async def serve(health: Health, host: str, port: int) -> web.AppRunner:
    """Listens until the runner is cleaned up; port 0 takes a free one, and the log says which."""

    async def healthz(_: web.Request) -> web.Response:
        problem = health.problem()
        return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", scrape)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    log.info("listening", host=host, port=runner.addresses[0][1])
    return runner
