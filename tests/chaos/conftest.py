"""One server, one zygote and one undisturbed run for the short form of all scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.runs import Cloud, Undisturbed, cloud, undisturbed

STEPS = 30


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with cloud(Path(tmp_path_factory.mktemp("cloud")), steps=STEPS) as found:
        yield found


@pytest.fixture(scope="session")
def reference(place: Cloud) -> Undisturbed:
    return undisturbed(place)
