"""Fixtures of the tests that need no root: a control plane of this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.local import LocalCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """A private control plane with KWOK, shared by the tests of this process."""
    with LocalCluster("control-plane", private=True) as found:
        found.start_kwok()
        yield found
