"""When the poller asks whom."""

from __future__ import annotations

from finetune_operator.progress.schedule import ProgressSettings, Schedule


def asked(schedule: Schedule, until: float, per_second: float) -> list[tuple[float, str]]:
    """Who is asked when, if each question takes no time and questions start at most so often."""
    tick, log, now = 1 / per_second, [], 0.0
    while now < until:
        key = schedule.next(now)
        if key is not None:
            log.append((now, key))
            schedule.done(key, now)
        now += tick
    return log


def full(pods: int) -> Schedule:
    schedule = Schedule(ProgressSettings(interval_seconds=10, writes_per_second=20))
    for index in range(pods):
        schedule.want(f"pod-{index}", 0.0)
    return schedule


def longest_gap(log: list[tuple[float, str]]) -> float:
    last: dict[str, float] = {}
    gap = 0.0
    for now, key in log:
        gap = max(gap, now - last.get(key, now))
        last[key] = now
    return gap


def test_a_new_pod_is_asked_at_once_and_then_every_interval() -> None:
    times = [round(now) for now, _ in asked(full(1), 35, 20)]
    assert times == [0, 10, 20, 30]


def test_a_hundred_pods_are_each_asked_within_eleven_seconds() -> None:
    log = asked(full(100), 120, 20)
    assert {key for _, key in log} == {f"pod-{index}" for index in range(100)}
    assert longest_gap(log) <= 11


def test_a_thousand_pods_stretch_the_interval_to_fifty_seconds() -> None:
    schedule = full(1000)
    assert schedule.interval == 50
    log = asked(schedule, 200, 20)
    assert len(log) <= 20 * 200
    assert 45 <= longest_gap(log) <= 56


def test_no_pod_is_asked_twice_at_the_same_time() -> None:
    schedule = full(1)
    assert schedule.next(0.0) == "pod-0"
    schedule.want("pod-0", 0.0)
    assert schedule.next(1.0) is None


def test_news_while_a_pod_is_asked_lead_to_another_question_at_once() -> None:
    schedule = full(1)
    schedule.next(0.0)
    schedule.want("pod-0", 1.0)
    schedule.done("pod-0", 0.0)
    assert schedule.next(0.9) is None
    assert schedule.next(1.0) == "pod-0"


def test_an_earlier_wish_replaces_the_regular_time_and_a_later_one_does_not() -> None:
    schedule = full(1)
    schedule.next(0.0)
    schedule.done("pod-0", 0.0)
    schedule.want("pod-0", 60.0)
    assert schedule.wait(0.0) == 10.0
    schedule.want("pod-0", 3.0)
    assert schedule.wait(0.0) == 3.0


def test_a_dropped_pod_is_never_asked_again() -> None:
    schedule = full(1)
    schedule.next(0.0)
    schedule.drop("pod-0")
    schedule.done("pod-0", 0.0)
    assert schedule.wait(0.0) is None
    assert schedule.next(1e9) is None
