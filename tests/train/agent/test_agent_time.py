"""Where an attempt's time went: each second in one bucket, and all of them together the attempt's wall time."""

from __future__ import annotations

import json
import time

import pytest

from finetune_api.documents import ProgressDocument
from finetune_trainer.agent.timekeeping import Activity, Phase, Timekeeper, Times
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.heartbeat import Heartbeat
from tests.train.agent.test_agent_serving import metrics_of


def test_the_buckets_add_up_to_the_wall_time_with_saves_and_evaluations_in_theirs(make_agent) -> None:
    does = {
        "steps": 10,
        "step_seconds": 0.2,
        "load_seconds": 1.0,
        "save_every": 5,
        "save_seconds": 1.5,
        "evaluate_step": 3,
        "evaluate_seconds": 2.0,
    }
    agent = make_agent(does=does)
    begun = time.monotonic()
    agent.start().wait_for_step(8)
    served = ProgressDocument.from_json(json.loads(agent.get("/progress"))).spent
    assert served is not None and served.total == pytest.approx(time.monotonic() - begun, abs=1.0)
    assert metrics_of(agent)["finetune_spent_seconds[save]"] >= 1.5
    assert agent.finish() == 0
    wall = time.monotonic() - begun
    spent = agent.message.spent
    assert spent is not None
    assert spent.total == pytest.approx(wall, rel=0.01, abs=0.15)  # the process's own start and exit, in a short run
    assert spent.train >= 2.0
    assert spent.evaluate >= 2.0
    assert spent.save >= 3.0
    assert spent.start >= 1.0
    assert spent.redo == 0
    assert agent.message.resumed_from_step is None


def test_a_further_attempt_says_what_it_resumed_from(make_agent) -> None:
    first = make_agent(does={"steps": 10_000, "save_every": 1_000_000}).start()
    first.wait_for_step(2)
    assert first.stop() == 100
    second = make_agent(does={"steps": first.message.checkpoint_step + 1}, attempt=1)
    assert second.execute() == 0
    assert second.message.resumed_from_step == first.message.checkpoint_step
    assert second.message.spent.restore > 0


class Clock:
    """A clock that tests set, and the file in which workers leave theirs."""

    def __init__(self, work: WorkDir) -> None:
        self.now = 100.0
        self.work = work
        work.state.mkdir(parents=True, exist_ok=True)
        self.keeper = Timekeeper(begun=100.0, clock=lambda: self.now)

    def worker_says(self, times: Times) -> None:
        self.work.times.write_text(json.dumps(times.to_json()))
        self.keeper.hear(self.work)


@pytest.fixture
def clock(tmp_path) -> Clock:
    return Clock(WorkDir(tmp_path))


def test_the_workers_clock_goes_on_from_the_agents(clock: Clock) -> None:
    clock.now = 103.0
    clock.keeper.enter(Phase.RESTORE)
    clock.now = 105.0
    clock.keeper.enter(Phase.START)
    clock.worker_says(Times(since=107.0).enter(Phase.TRAIN, 110.0))
    clock.now = 130.0
    assert clock.keeper.spent.model_dump() == dict(start=8, restore=2, train=20, evaluate=0, save=0, redo=0)
    clock.keeper.enter(Phase.SAVE)
    clock.now = 131.0
    assert clock.keeper.spent.total == 31.0
    assert clock.keeper.spent.save == 1.0


def test_the_clock_of_workers_that_have_ended_does_not_count_again(clock: Clock) -> None:
    clock.worker_says(Times(since=101.0).enter(Phase.TRAIN, 102.0))
    clock.now = 112.0
    clock.keeper.enter(Phase.SAVE)
    clock.keeper.hear(clock.work)
    clock.now = 113.0
    assert clock.keeper.spent.model_dump() == dict(start=2, restore=0, train=10, evaluate=0, save=1, redo=0)


def test_a_rollback_moves_the_steps_that_it_throws_away_to_redo(clock: Clock) -> None:
    clock.keeper.resumed_from(20)
    clock.worker_says(Times(since=100.0, phase=Phase.TRAIN))
    clock.now = 150.0  # 50 steps of a second each
    clock.keeper.roll_back(step=70, to_step=60)
    assert clock.keeper.spent.model_dump() == dict(start=0, restore=0, train=40, evaluate=0, save=0, redo=10)
    clock.worker_says(Times(since=150.0, phase=Phase.TRAIN))
    clock.now = 170.0  # 20 more
    clock.keeper.roll_back(step=80, to_step=50)
    assert clock.keeper.spent.model_dump() == dict(start=0, restore=0, train=30, evaluate=0, save=0, redo=40)
    clock.worker_says(Times(since=170.0, phase=Phase.TRAIN))
    clock.now = 171.0
    clock.keeper.roll_back(step=51, to_step=0)
    assert clock.keeper.spent.model_dump() == dict(start=0, restore=0, train=0, evaluate=0, save=0, redo=71)


def test_a_broken_clock_file_changes_nothing(clock: Clock) -> None:
    clock.work.times.write_text('{"since": 101.0, "spent": {"train": -5}}')
    clock.keeper.hear(clock.work)
    clock.now = 110.0
    assert clock.keeper.spent.start == 10.0


def test_a_long_phase_is_alive_as_long_as_signs_of_its_own_come_within_the_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("finetune_trainer.worker.heartbeat._INTERVAL_SECONDS", 0.05)
    path = WorkDir(tmp_path).heartbeat(0)
    heartbeat = Heartbeat(path)

    def signs(seconds: float) -> int:
        """How often somebody who looks every 0.1 s finds a new sign."""
        seen = set()
        for _ in range(round(seconds / 0.1)):
            time.sleep(0.1)
            seen.add(path.stat().st_mtime_ns)
        return len(seen)

    with heartbeat.long_phase(limit_seconds=2.0):
        time.sleep(1.5)
        heartbeat.beat()
        time.sleep(1.0)
        assert signs(0.5) > 1, "the second call has a limit of its own"
        time.sleep(1.5)
        assert signs(0.5) == 1, "a call that hangs is silent after its limit"


def test_a_heartbeat_says_what_its_rank_does_and_keeps_the_time_of_each_phase(tmp_path) -> None:
    work = WorkDir(tmp_path)
    heartbeat = Heartbeat(work.heartbeat(0), work.times)
    heartbeat.doing(Activity.STEPPING)
    with heartbeat.during(Activity.SAVING):
        assert work.heartbeat(0).read_text().strip() == "saving a checkpoint"
        time.sleep(0.2)
    heartbeat.doing(Activity.READING_DATA)
    assert work.heartbeat(0).read_text().strip() == "reading data"
    times = Times.from_json(json.loads(work.times.read_text()))
    assert times.phase is Phase.TRAIN
    assert times.spent.save >= 0.2
    assert times.spent.total == pytest.approx(times.since - times.begun)
