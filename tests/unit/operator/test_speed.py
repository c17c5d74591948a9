"""A run that is slower than planned is told, goes on, and is told no more once it is clearly fast enough."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.status import AttemptRecord, ConditionStatus, ConditionType, FineTuneJobStatus
from finetune_operator.actions import Decision
from finetune_operator.decide import decide
from tests.unit.operator.builders import CONFIG, a_job, a_pod, a_snapshot, a_spec, an_attempt, later
from tests.unit.operator.test_attempt_decisions import planned
from tests.unit.operator.test_guards_told import progress

EARLIER = AttemptRecord(number=0, pool="a100", start_time="", end_time="", outcome="Evicted", tokens_per_second=1000.0)


def decided(
    status: FineTuneJobStatus | None = None, *, deadline: int | None = None, earlier: bool = False, **fields: Any
) -> Decision:
    """What follows ten minutes after the first start."""
    limit = {"deadlineSeconds": deadline} if deadline is not None else {}
    spec = a_spec(resources={"nodes": 2, "gpus": 1}, **limit)
    update = {
        "progress": progress(**fields),
        "start_time": "2026-11-22T12:00:00Z",
        "attempts": [EARLIER] if earlier else [],
    }
    job = a_job(spec, status=(status or planned()).model_copy(update=update))
    seen = a_snapshot(job, attempts=(an_attempt(),), pods=(a_pod(index=0), a_pod(index=1)), now=later(600))
    return decide(seen, CONFIG)


def training(decision: Decision) -> tuple[str, str]:
    condition = decision.status.condition(ConditionType.TRAINING)
    assert condition is not None and condition.status == ConditionStatus.TRUE, "it still trains"
    return condition.reason, condition.message


@pytest.mark.parametrize(("eta", "reason"), [(2999, "PodsRunning"), (3001, "SlowerThanPlanned"), (None, "PodsRunning")])
def test_an_estimate_beyond_the_deadline_is_told(eta: int | None, reason: str) -> None:
    decision = decided(deadline=3600, eta_seconds=eta)
    assert training(decision)[0] == reason
    warnings = [event.reason for event in decision.events if event.type == "Warning"]
    assert warnings == (["SlowerThanPlanned"] if reason == "SlowerThanPlanned" else [])


def test_the_warning_names_both_times_and_the_field() -> None:
    _, message = training(decided(deadline=3600, eta_seconds=5000))
    assert "needs about 5000 s more, and spec.deadlineSeconds ends at 2026-11-22T13:00:00Z" in message
    assert "raise it while the job runs" in message


def test_without_a_deadline_no_estimate_is_too_long() -> None:
    assert training(decided(eta_seconds=2**31))[0] == "PodsRunning"


@pytest.mark.parametrize(("speed", "reason"), [(499.0, "SlowerThanPlanned"), (500.0, "PodsRunning")])
def test_less_than_half_the_speed_of_an_earlier_attempt_is_told(speed: float, reason: str) -> None:
    assert training(decided(earlier=True, tokens_per_second=speed))[0] == reason
    assert training(decided(earlier=False, tokens_per_second=speed))[0] == "PodsRunning"


def test_the_warning_stays_until_the_run_is_clearly_fast_enough() -> None:
    slow = decided(earlier=True, tokens_per_second=499.0).status
    better = decided(slow, earlier=True, tokens_per_second=550.0)
    assert training(better)[0] == "SlowerThanPlanned"
    assert better.events == ()
    assert training(decided(better.status, earlier=True, tokens_per_second=610.0))[0] == "PodsRunning"
    late = decided(deadline=3600, eta_seconds=3001).status
    assert training(decided(late, deadline=3600, eta_seconds=2800))[0] == "SlowerThanPlanned"
    assert training(decided(late, deadline=3600, eta_seconds=2600))[0] == "PodsRunning"


def test_a_slow_run_is_no_failure() -> None:
    status = decided(deadline=3600, eta_seconds=5000).status
    assert status.failure is None and status.failures is None
    assert not status.is_true(ConditionType.FAILED) and not status.is_true(ConditionType.STALLED)
