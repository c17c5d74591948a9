"""One S3 server for all tests of sources, with a user that owns one bucket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.s3 import S3Server
from tests.train.sources.hub_server import HubServer

USER = "team-a"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_user(USER)
        server.create_bucket("team-a", owner=USER)
        server.create_bucket("foreign")
        yield server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
