"""Starts the operator: health, then the Lease, then watches, workers, poller and pools. Any of them ending ends all."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from finetune_operator import logs
from finetune_operator.config import Config, ConfigError, parse_config
from finetune_operator.health import Health, serve
from finetune_operator.kube import ApiError, Kube, connect
from finetune_operator.lease import Elector, LeaseLost
from finetune_operator.pools import PoolReporter
from finetune_operator.progress import Poller, ProgressSettings
from finetune_operator.queue import KeyedQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.watch import Watcher

log = structlog.get_logger()

WRONG_SETTINGS = 2
RETRY_SECONDS = 2.0
SECONDS_TO_STOP = 5.0


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Runs until asked to stop; the exit status is 0 then, 1 where something broke, 2 for wrong settings."""
    try:
        config = parse_config(environ, identity=f"{socket.gethostname()}-{secrets.token_hex(4)}")
    except ConfigError as error:
        sys.stderr.write(f"finetune_operator: {error}\n")
        return WRONG_SETTINGS
    logs.set_up(config)
    try:
        return asyncio.run(run(config))
    except KeyboardInterrupt:
        return 0


async def run(config: Config) -> int:
    """The whole life of the process; returns its exit status."""
    health = Health()
    stop = asyncio.Event()
    _on_signals(stop)
    api: Any = await connect()  # its close has no type hints
    # The Lease has connections of its own, so that it never waits behind other requests, and its requests fail well
    # before the renew deadline.
    lease_api: Any = await connect()
    elector = Elector(Kube(lease_api, request_seconds=config.lease_renew_seconds / 3), config)
    runner = await serve(health, config.http_host, config.http_port)
    measuring = asyncio.create_task(health.measure())
    try:
        if await _or_stopped(elector.acquire(), stop):
            return 0
        if await _or_stopped(_wait_for_definitions(Kube(api)), stop):
            await elector.release()
            return 0
        health.leading()
        status = await _lead(config, api, elector, health, stop)
        await elector.release()
        return status
    finally:
        measuring.cancel()
        await runner.cleanup()
        await api.close()
        await lease_api.close()


async def _lead(config: Config, api: Any, elector: Elector, health: Health, stop: asyncio.Event) -> int:
    kube, queue = Kube(api), KeyedQueue()
    poller = Poller(
        api,
        ProgressSettings(
            interval_seconds=config.progress_interval_seconds, writes_per_second=config.progress_writes_per_second
        ),
    )
    pools = PoolReporter(api, resync_seconds=config.pools_resync_seconds)
    watcher = Watcher(kube, config, queue, poller, pools, health)
    watching = asyncio.Event()
    reconciler = Reconciler(kube, config)

    async def reconcile(key: str) -> float | None:
        if not elector.leads:
            return RETRY_SECONDS  # the renewal decides whether this process lives on
        return await reconciler(key)

    parts: dict[str, Coroutine[Any, Any, Any]] = {
        "lease": elector.renew(),
        "watch": watcher.run(watching),
        "signals": _take_signals_back(watching, stop),
        "workers": queue.run(reconcile, config.workers),
        "resync": _resync(watcher, config),
        "progress": poller.run(),
        "pools": pools.run(),
    }
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    stopping = asyncio.create_task(stop.wait(), name="stop")
    done, pending = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
    status = _report(done)
    for task in pending:
        task.cancel()
    await asyncio.wait(pending, timeout=SECONDS_TO_STOP)
    return status


def _report(done: set[asyncio.Task[Any]]) -> int:
    """The exit status. Loss of the Lease ends the process at once: no clean-up may write anything."""
    for task in done:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, LeaseLost):
            log.error("lease_lost", error=str(error))
            sys.stderr.flush()
            os._exit(1)
        if error is not None:
            log.error("part_broke", part=task.get_name(), error=repr(error), exc_info=error)
            return 1
    names = sorted(task.get_name() for task in done)
    log.info("stopping", because=names)
    return 0


async def _resync(watcher: Watcher, config: Config) -> None:
    while True:
        await asyncio.sleep(config.resync_seconds)
        try:
            await watcher.resync()
        except ApiError as error:
            log.warning("resync_failed", error=str(error))


async def _wait_for_definitions(kube: Kube) -> None:
    """Returns when the FineTuneJob and GPUPool resources can be listed: kopf looks for them only once."""
    while True:
        try:
            for kind in ("FineTuneJob", "GPUPool"):
                await kube.list(kind)
            return
        except ApiError as error:
            log.warning("waiting_for_definitions", error=str(error))
            await asyncio.sleep(RETRY_SECONDS)


async def _or_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Whether the process was asked to stop before the work was done; an error of the work is raised."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if tasks[0] in done:
        tasks[0].result()
        return False
    return True


async def _take_signals_back(watching: asyncio.Event, stop: asyncio.Event) -> None:
    """kopf takes the signals over when it starts, and then stops slowly."""
    await watching.wait()
    _on_signals(stop)
    await stop.wait()


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
