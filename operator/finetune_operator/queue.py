"""The keyed work queue: a key waits at most once, is worked on by one worker at a time, and comes back after failure."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from finetune_operator import metrics
from finetune_operator.kube import ApiError, Conflict

log = structlog.get_logger()
Handler = Callable[[str], Awaitable[float | None]]

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 120.0


def backoff_seconds(failures: int, dice: Callable[[], float] = random.random) -> float:
    """Seconds before the next try after that many failures in a row: doubling, with up to half of it as jitter."""
    seconds = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20))
    return seconds * (0.5 + 0.5 * dice())


class KeyedQueue:
    """Keys to look at. All methods belong to one event loop.

    add: look at the key as soon as a worker is free; a key that is being worked on is looked at again afterwards.
    add_after: look at it later; the earliest request for a key wins.
    """

    def __init__(self) -> None:
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: set[str] = set()
        self._active: set[str] = set()
        self._again: set[str] = set()
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        self._failures: dict[str, int] = {}

    def add(self, key: str) -> None:
        """The key is looked at as soon as possible, once for any number of calls before that."""
        if key in self._active:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)
            metrics.QUEUE_DEPTH.set(len(self._waiting))

    def add_after(self, key: str, seconds: float) -> None:
        """The key is looked at after that many seconds, or earlier if somebody asked for that."""
        due = time.monotonic() + seconds
        if key in self._timers:
            planned, timer = self._timers[key]
            if planned <= due:
                return
            timer.cancel()
        handle = asyncio.get_running_loop().call_later(seconds, self._ring, key)
        self._timers[key] = (due, handle)

    async def run(self, handler: Handler, workers: int) -> None:
        """Works until cancelled. A handler returns the seconds after which it wants the key again, or None."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._work(handler))

    def _ring(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def _work(self, handler: Handler) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._active.add(key)
            metrics.QUEUE_DEPTH.set(len(self._waiting))
            try:
                await self._handle(handler, key)
            finally:
                self._active.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    async def _handle(self, handler: Handler, key: str) -> None:
        started = time.monotonic()
        try:
            again = await handler(key)
        except Conflict as error:
            # Somebody wrote in between: not a failure, but not for ever either.
            self._come_back(key, "conflict", error)
        except ApiError as error:
            self._come_back(key, "api_error", error)
        except Exception as error:
            log.exception("reconcile_failed", job=key)
            self._come_back(key, "error", error)
        else:
            self._failures.pop(key, None)
            metrics.RECONCILES.labels(outcome="done").inc()
            if again is not None:
                self.add_after(key, again)
        finally:
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)

    def _come_back(self, key: str, outcome: str, error: Exception) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = backoff_seconds(failures)
        metrics.RECONCILES.labels(outcome=outcome).inc()
        if outcome != "conflict" or failures > 3:
            log.warning("will_retry", job=key, outcome=outcome, seconds=round(seconds, 1), error=str(error))
        self.add_after(key, seconds)
