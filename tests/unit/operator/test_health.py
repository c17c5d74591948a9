"""The probe fails when the watches are dead, and not while they start."""

from __future__ import annotations

import aiohttp
import pytest

from finetune_operator import health as module
from finetune_operator.health import Health, serve


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, in its only element."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_standby_is_well_without_watches(clock: list[float]) -> None:
    health = Health()
    clock[0] += 10_000
    assert health.problem() is None


def test_a_leader_must_see_its_own_renewals(clock: list[float]) -> None:
    health = Health()
    health.leading()
    clock[0] += 59
    assert health.problem() is None
    health.saw_renewal()
    clock[0] += 29
    assert health.problem() is None
    clock[0] += 2
    assert health.problem() == "no watch has told of our Lease for 31 s"
    health.saw_renewal()
    assert health.problem() is None


def test_a_leader_whose_watch_never_starts_is_not_well(clock: list[float]) -> None:
    health = Health()
    health.leading()
    clock[0] += 61
    assert health.problem() == "no watch has told of our Lease for 61 s"


async def test_the_pages_are_served() -> None:
    health = Health()
    runner = await serve(health, "127.0.0.1", 0)
    try:
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{base}/healthz") as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
            async with session.get(f"{base}/metrics") as answer:
                assert "finetune_operator_queue_depth" in await answer.text()
    finally:
        await runner.cleanup()
