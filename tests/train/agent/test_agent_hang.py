"""Silence of all workers is a hang, with the rank that began it, what each rank did, and their stacks."""

from __future__ import annotations

import pytest

from finetune_trainer.agent.hang import HangLimits, HangWatch, Sign, tell_silence
from finetune_trainer.agent.timekeeping import Activity

LIMITS = HangLimits(least=60, start=1800)


def test_a_hang_ends_the_attempt_and_shows_the_stacks(make_agent) -> None:
    agent = make_agent(does={"steps": 10, "hang_step": 4}, arguments=("--hang-seconds", "1"))
    assert agent.execute() == 84
    assert agent.message.outcome == "Hang"
    assert "after step 3" in agent.message.message
    assert "in one_step" in agent.err  # faulthandler's stack of the worker
    assert "Rank 0 fell silent while reading data." in agent.message.message


def test_the_rank_that_others_wait_for_is_named_and_the_stacks_of_all_are_kept(make_agent, make_run, output) -> None:
    does = {"steps": 10, "hang_step": 4, "hang_rank": 1}
    agent = make_agent(make_run(processes=2), attempt=3, does=does, arguments=("--hang-seconds", "1"))
    assert agent.execute() == 84
    message = agent.message.message
    assert "Rank 1 fell silent first, while reading data; rank 0 held up while waiting for the other ranks." in message
    logs = output / "logs" / "attempt-3"
    assert f"is in {logs.as_uri()}/." in message or f"is in {logs}/." in message
    for rank in (0, 1):
        kept = (logs / f"rank-{rank}.log").read_text()
        assert "step 3" in kept and "in one_step" in kept


def test_workers_that_never_start_to_train_hang_after_the_longer_limit(make_agent) -> None:
    agent = make_agent(does={"load_seconds": 600}, arguments=("--hang-seconds", "0.1", "--start-seconds", "2"))
    assert agent.execute() == 84
    assert "in stage Loading" in agent.message.message


def watch_steps(seconds: float, steps: int) -> tuple[HangWatch, float]:
    watch, now = HangWatch(LIMITS, 0.0), 0.0
    for step in range(steps):
        watch.see(now, (step, step), step, stepping=True)
        now += seconds
    return watch, now - seconds


def test_the_limit_is_five_median_steps_but_at_least_the_least() -> None:
    slow, _ = watch_steps(40.0, 10)
    assert slow.limit == 200.0
    fast, _ = watch_steps(0.1, 10)
    assert fast.limit == 60


def test_one_slow_step_does_not_move_the_limit() -> None:
    watch, now = watch_steps(20.0, 9)
    watch.see(now + 500, (99, 99), 9, stepping=True)
    assert watch.limit == 100.0


def test_before_the_first_step_and_while_publishing_the_longer_limit_holds() -> None:
    watch = HangWatch(LIMITS, 0.0)
    watch.see(1.0, (1,), None, stepping=False)
    assert (watch.limit, watch.is_hung(1700.0)) == (1800, False)
    trained, now = watch_steps(1.0, 5)
    assert trained.is_hung(now + 61)
    trained.see(now, (5, 5), None, stepping=False)
    assert not trained.is_hung(now + 61)


def test_one_living_rank_is_enough() -> None:
    watch, now = watch_steps(1.0, 5)
    for tick in range(200):
        watch.see(now + tick, (4, 1000 + tick), 4, stepping=True)
    assert not watch.is_hung(now + 199)


def test_a_clock_that_is_set_back_is_a_sign_of_life_too() -> None:
    watch, now = watch_steps(1.0, 5)
    watch.see(now + 59, (-5000, -5000), 4, stepping=True)
    assert watch.silence(now + 60) == 1.0


@pytest.mark.parametrize(
    ("signs", "whole", "words"),
    [
        (
            [Sign(0, 9, Activity.WAITING), Sign(1, 5, Activity.READING_DATA), Sign(2, 9, Activity.WAITING)],
            True,
            "Rank 1 fell silent first, while reading data; ranks 0, 2 held up while waiting for the other ranks.",
        ),
        (
            [Sign(0, 9, Activity.SAVING), Sign(1, 5, Activity.STEPPING)],
            True,
            "Rank 1 fell silent first, while computing a step; rank 0 while saving a checkpoint.",
        ),
        (
            [Sign(0, 9, Activity.STEPPING), Sign(1, 5, Activity.STEPPING)],
            True,
            "Ranks 0, 1 fell silent while computing a step: all at the same place, as in a collective operation.",
        ),
        (
            [Sign(2, 9, Activity.WAITING), Sign(3, 5, Activity.WAITING)],
            False,
            "Ranks 2, 3 fell silent while waiting for the other ranks. The cause is on another node: look at the logs "
            "of the other pods.",
        ),
        ([Sign(0, 0, None)], True, "Rank 0 fell silent."),
    ],
)
def test_a_hang_on_its_own_is_told_from_one_in_a_collective(signs: list[Sign], whole: bool, words: str) -> None:
    assert tell_silence(signs, whole_gang=whole) == words
