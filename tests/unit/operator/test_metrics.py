"""What Prometheus counts of attempts, interruptions, retries and time."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from finetune_api.failures import TABLE
from finetune_api.status import FineTuneJobStatus
from finetune_operator import metrics
from finetune_operator.actions import Event
from tests.unit.operator.world import World

PREFIX = "finetune_operator_"


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(PREFIX + name, labels) or 0.0


def counted(world: World) -> dict[str, float]:
    """By how much the counters grew over the writes of a job's life."""
    names = {
        **{f"ended {outcome}": ("attempts_ended_total", {"class": outcome}) for outcome in metrics.OUTCOMES},
        **{f"retried {name}": ("retries_total", {"class": name}) for name in TABLE},
        "interruptions": ("interruptions_total", {}),
        **{part: ("job_seconds_total", {"part": part}) for part in metrics.PARTS.values()},
    }
    before = {key: value(name, **labels) for key, (name, labels) in names.items()}
    seen = FineTuneJobStatus()
    for status in world.run_to_the_end().statuses:
        metrics.count_change(seen, status)
        seen = status
    grown = {key: value(name, **labels) - before[key] for key, (name, labels) in names.items()}
    return {key: amount for key, amount in grown.items() if amount}


def test_attempts_interruptions_and_retries_are_counted_once_each() -> None:
    world = World(outcomes=("Hang", "Evicted", "Hang", "Succeeded"))
    found = counted(world)
    assert {key: amount for key, amount in found.items() if " " in key or key == "interruptions"} == {
        "ended Hang": 2,
        "ended Evicted": 1,
        "ended Succeeded": 1,
        "retried Hang": 2,
        "interruptions": 1,
    }
    goodput = world.job.status.goodput
    assert goodput is not None
    for field, part in metrics.PARTS.items():
        assert found.get(part, 0) == getattr(goodput, field), part


def test_a_failure_that_ends_the_job_is_no_retry() -> None:
    found = counted(World(outcomes=("DataInvalid",)))
    assert found["ended DataInvalid"] == 1
    assert not [key for key in found if key.startswith("retried")]


def test_labels_are_bounded() -> None:
    assert set(metrics.OUTCOMES) == {"Succeeded", "Suspended", *TABLE}
    assert sorted(metrics.PARTS.values()) == sorted(
        ["queue", "start", "train", "evaluate", "save", "restore", "redo", "down"]
    )
    hostile = FineTuneJobStatus(endings={"x" * 1000: 5})
    metrics.count_change(FineTuneJobStatus(), hostile)
    exported = {sample.labels.get("class") for metric in REGISTRY.collect() for sample in metric.samples}
    assert "x" * 1000 not in exported


@pytest.mark.parametrize("name", ["RolledBack", "SlowerThanPlanned"])
def test_an_event_is_counted_by_its_reason(name: str) -> None:
    before = value("transitions_total", reason=name)
    metrics.count_events([Event("Warning", name, "x")])
    assert value("transitions_total", reason=name) == before + 1
