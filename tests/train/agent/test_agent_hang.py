"""Silence of all workers is a hang, with their stacks in the log; slow steps and loading are not."""

from __future__ import annotations

from finetune_trainer.agent.hang import HangLimits, HangWatch

LIMITS = HangLimits(least=60, start=1800)


def test_a_hang_ends_the_attempt_and_shows_the_stacks(make_agent) -> None:
    agent = make_agent(does={"steps": 10, "hang_step": 4}, arguments=("--hang-seconds", "1"))
    assert agent.execute() == 84
    assert agent.message.outcome == "Hang"
    assert "after step 3" in agent.message.message
    assert "in one_step" in agent.err  # faulthandler's stack of the worker


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
