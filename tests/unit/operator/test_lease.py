"""The Lease: one holder, taken over only after its own time is up, lost when it cannot be renewed."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from finetune_operator.kube import ApiError, Body, Conflict, Kube, NotFound
from finetune_operator.lease import Elector, LeaseLost
from tests.unit.operator.builders import CONFIG

QUICK = replace(CONFIG, lease_duration_seconds=0.4, lease_renew_seconds=0.2, lease_retry_seconds=0.05)


class Leases:
    """One Lease with the API server's version check, which can be cut off."""

    def __init__(self) -> None:
        self.stored: Body | None = None
        self.cut_off = False

    async def get(self, kind: str, name: str, namespace: str | None = None) -> Body:
        self._reach()
        if self.stored is None:
            raise NotFound(404, "NotFound", name)
        return copy.deepcopy(self.stored)

    async def create(self, body: Mapping[str, Any]) -> Body:
        self._reach()
        if self.stored is not None:
            raise Conflict(409, "AlreadyExists", "lease")
        return self._store(body, "1")

    async def replace(self, body: Mapping[str, Any]) -> Body:
        self._reach()
        assert self.stored is not None
        version = self.stored["metadata"]["resourceVersion"]
        if body["metadata"]["resourceVersion"] != version:
            raise Conflict(409, "Conflict", "lease")
        return self._store(body, str(int(version) + 1))

    @property
    def holder(self) -> str:
        assert self.stored is not None
        return str(self.stored["spec"]["holderIdentity"])

    def _store(self, body: Mapping[str, Any], version: str) -> Body:
        self.stored = copy.deepcopy(dict(body))
        self.stored["metadata"]["resourceVersion"] = version
        return copy.deepcopy(self.stored)

    def _reach(self) -> None:
        if self.cut_off:
            raise ApiError(0, "NoAnswer", "cut off")


def elector(leases: Leases, identity: str) -> Elector:
    """A candidate with short times."""
    return Elector(cast(Kube, leases), replace(QUICK, identity=identity))


async def test_the_first_takes_it_and_the_second_waits() -> None:
    leases = Leases()
    first, second = elector(leases, "a"), elector(leases, "b")
    await first.acquire()
    renewing = asyncio.create_task(first.renew())
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(1.0)  # more than twice the duration
    assert (leases.holder, first.leads, waiting.done()) == ("a", True, False)
    renewing.cancel()
    waiting.cancel()


async def test_a_holder_that_vanishes_is_followed_after_its_time() -> None:
    leases = Leases()
    await elector(leases, "a").acquire()
    second = elector(leases, "b")
    # a whole second, because the record holds whole seconds
    await asyncio.wait_for(second.acquire(), 5)
    assert leases.holder == "b"
    assert leases.stored is not None and leases.stored["spec"]["leaseTransitions"] == 2


async def test_a_lease_given_back_is_free_at_once() -> None:
    leases = Leases()
    first = elector(leases, "a")
    await first.acquire()
    await first.release()
    assert (leases.holder, first.leads) == ("", False)
    await asyncio.wait_for(elector(leases, "b").acquire(), 0.3)
    assert leases.holder == "b"


async def test_a_holder_that_is_cut_off_loses_it_before_anybody_may_take_it() -> None:
    leases = Leases()
    first = elector(leases, "a")
    await first.acquire()
    leases.cut_off = True
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(first.renew(), QUICK.lease_duration_seconds)
    assert not first.leads


async def test_a_short_cut_off_is_survived() -> None:
    leases = Leases()
    first = elector(leases, "a")
    await first.acquire()
    renewing = asyncio.create_task(first.renew())
    leases.cut_off = True
    await asyncio.sleep(0.1)
    leases.cut_off = False
    await asyncio.sleep(0.5)
    assert (first.leads, renewing.done()) == (True, False)
    renewing.cancel()


async def test_of_two_that_take_a_free_lease_at_once_one_wins() -> None:
    leases = Leases()
    candidates = [elector(leases, name) for name in "abc"]
    tasks = [asyncio.create_task(candidate.acquire()) for candidate in candidates]
    await asyncio.sleep(0.1)
    assert sum(task.done() for task in tasks) == 1
    for task in tasks:
        task.cancel()
