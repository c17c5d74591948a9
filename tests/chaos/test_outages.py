"""The short form of the outages: the storage is gone when the run ends."""

from __future__ import annotations

from tests.chaos.outages import away_at_the_end
from tests.chaos.runs import Cloud, Undisturbed


def test_a_run_ends_well_when_the_storage_comes_back(place: Cloud, reference: Undisturbed) -> None:
    away_at_the_end(place, reference)
