"""What guards have changed is told once each, and stays in status over all attempts."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus, Progress
from finetune_operator.actions import Decision
from finetune_operator.decide import decide
from tests.unit.operator.builders import CONFIG, later
from tests.unit.operator.test_attempt_decisions import look, planned


def progress(attempt: int = 1, **fields: Any) -> Progress:
    """The attempt at half of its steps."""
    return Progress(
        attempt=attempt,
        stage="Training",
        step=50,
        total_steps=100,
        percent=50,
        summary="50% 50/100",
        update_time="2026-11-22T12:00:00Z",
        **fields,
    )


def decided(status: FineTuneJobStatus | None = None, **fields: Any) -> Decision:
    """What follows where the running attempt says this."""
    base = status or planned()
    return decide(look(status=base.model_copy(update={"progress": progress(**fields)}), now=later(60)), CONFIG)


def test_a_rollback_is_one_warning_and_stays_in_status() -> None:
    first = decided(rollbacks=1, last_rollback="the loss rose at step 40: the run went back to step 30")
    assert (first.events[-1].type, first.events[-1].reason) == ("Warning", "RolledBack")
    assert first.events[-1].message == "the loss rose at step 40: the run went back to step 30"
    assert first.status.guards is not None and first.status.guards.rollbacks == 1
    assert decided(first.status, rollbacks=1).events == ()
    second = decided(first.status, rollbacks=2, last_rollback="the loss rose at step 60")
    assert [event.message for event in second.events] == ["the loss rose at step 60"]


def test_a_halved_micro_batch_is_one_warning_with_both_sizes() -> None:
    base = planned()
    assert base.plan is not None
    first = decided(micro_batch_size=2)
    assert first.events[-1].reason == "MicroBatchHalved"
    assert f"the micro batch is 2 instead of {base.plan.micro_batch_size} from now on" in first.events[-1].message
    assert decided(first.status, micro_batch_size=2).events == ()
    assert [event.reason for event in decided(first.status, micro_batch_size=1).events] == ["MicroBatchHalved"]


@pytest.mark.parametrize("said", [{}, {"rollbacks": 1}, {"micro_batch_size": 4}, {"micro_batch_size": -1}])
def test_what_was_told_is_never_taken_back(said: dict[str, Any]) -> None:
    before = decided(rollbacks=2, last_rollback="x", micro_batch_size=2).status
    after = decided(before, **said)
    assert after.events == ()
    assert after.status.guards == before.guards


def test_what_another_attempt_said_is_not_this_ones() -> None:
    assert decided(attempt=7, rollbacks=3).status.guards is None


def test_a_decision_that_ended_an_attempt_is_not_told_a_second_time() -> None:
    status = planned()
    record = {
        "number": 0,
        "pool": "a100",
        "startTime": "2026-11-22T11:00:00Z",
        "endTime": "2026-11-22T11:30:00Z",
        "outcome": "RolledBack",
    }
    status = FineTuneJobStatus.from_json({**status.to_json(), "attempts": [record]})
    after = decided(status, rollbacks=1, last_rollback="x")
    assert "RolledBack" not in [event.reason for event in after.events]
    assert after.status.guards is not None and after.status.guards.rollbacks == 1
