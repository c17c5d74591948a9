"""Fixtures of the tests that own the machine's pod bridge: root, containerd, and nobody else's full cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.images import docker_answers
from tests.cluster.local import LocalCluster
from tests.cluster.network import bridge_exists


@pytest.fixture(scope="session", autouse=True)
def sole_owner() -> None:
    """Skips where these tests cannot run, or would end a cluster that somebody uses."""
    if os.geteuid() != 0 or docker_answers():
        pytest.skip("the embedded full cluster needs root, and is not used where a Docker engine answers")
    if bridge_exists():
        pytest.skip("a full cluster is up; run `make cluster-down` first")


@pytest.fixture
def cluster(sole_owner: None) -> Iterator[LocalCluster]:
    """A full cluster, not started yet; gone after the test, however the test left it."""
    found = LocalCluster("full")
    yield found
    found.down()
