"""The keyed queue: at most one worker per key, nothing lost, failures come back later and later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from finetune_operator.kube import ApiError
from finetune_operator.queue import LONGEST_BACKOFF_SECONDS, Handler, KeyedQueue, backoff_seconds


@asynccontextmanager
async def working(queue: KeyedQueue, handler: Handler, workers: int = 3) -> AsyncIterator[None]:
    """Workers run inside the block."""
    task = asyncio.create_task(queue.run(handler, workers))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settle() -> None:
    """Lets every ready task run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_many_requests_before_the_work_are_one_look() -> None:
    queue, seen = KeyedQueue(), []

    async def handler(key: str) -> None:
        seen.append(key)

    for _ in range(5):
        queue.add("a")
    queue.add("b")
    async with working(queue, handler):
        await settle()
    assert sorted(seen) == ["a", "b"]


async def test_a_request_during_the_work_is_looked_at_afterwards_never_beside_it() -> None:
    queue, gate = KeyedQueue(), asyncio.Event()
    running, most, looks = 0, 0, 0

    async def handler(key: str) -> None:
        nonlocal running, most, looks
        running += 1
        looks += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    async with working(queue, handler):
        queue.add("a")
        await settle()
        queue.add("a")
        queue.add("a")
        await settle()
        assert (looks, most) == (1, 1)
        gate.set()
        await settle()
    assert (looks, most) == (2, 1)


async def test_a_key_that_fails_comes_back_and_does_not_hold_up_others() -> None:
    queue, seen = KeyedQueue(), []
    done = asyncio.Event()

    async def handler(key: str) -> None:
        seen.append(key)
        if key == "a" and seen.count("a") < 3:
            raise ApiError(500, "InternalError", "etcd is away")
        if key == "a":
            done.set()

    async with working(queue, handler, workers=1):
        queue.add("a")
        queue.add("b")
        await asyncio.wait_for(done.wait(), 10)
    assert seen[:2] == ["a", "b"]
    assert seen.count("a") == 3


async def test_an_unexpected_error_does_not_end_the_workers() -> None:
    queue, seen = KeyedQueue(), []

    async def handler(key: str) -> None:
        seen.append(key)
        raise ValueError(key)

    async with working(queue, handler, workers=1):
        queue.add("a")
        await settle()
        queue.add("b")
        await settle()
    assert seen == ["a", "b"]


async def test_the_earliest_of_two_later_looks_counts() -> None:
    queue, seen = KeyedQueue(), asyncio.Event()

    async def handler(key: str) -> None:
        seen.set()

    async with working(queue, handler):
        queue.add_after("a", 3600)
        queue.add_after("a", 0.01)
        queue.add_after("a", 1800)
        await asyncio.wait_for(seen.wait(), 5)


async def test_a_handler_can_ask_for_a_later_look() -> None:
    queue, seen = KeyedQueue(), []
    twice = asyncio.Event()

    async def handler(key: str) -> float | None:
        seen.append(key)
        if len(seen) == 2:
            twice.set()
            return None
        return 0.01

    async with working(queue, handler):
        queue.add("a")
        await asyncio.wait_for(twice.wait(), 5)


@pytest.mark.parametrize(("failures", "least", "most"), [(1, 0.25, 0.5), (2, 0.5, 1.0), (5, 4.0, 8.0)])
def test_backoff_doubles_and_jitters(failures: int, least: float, most: float) -> None:
    assert backoff_seconds(failures, lambda: 0.0) == least
    assert backoff_seconds(failures, lambda: 1.0) == most


def test_backoff_has_a_limit() -> None:
    assert backoff_seconds(10_000, lambda: 1.0) == LONGEST_BACKOFF_SECONDS
