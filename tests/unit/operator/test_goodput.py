"""Where a job's time went: the parts add up to the whole, whatever pods say of themselves."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest

from finetune_api.documents import Spent
from finetune_api.status import Goodput
from finetune_operator.clock import parse_time
from finetune_operator.decide.goodput import PARTS, AttemptTime, with_attempt, with_gap
from tests.unit.operator.builders import later

HISTORIES = 2000


def parts(found: Goodput) -> dict[str, int]:
    """The parts in seconds."""
    return {name: getattr(found, f"{name}_seconds") for name in PARTS}


def span(found: Goodput) -> int:
    """Seconds from the first attempt to the newest end."""
    return int((parse_time(found.until_time) - parse_time(found.since_time)).total_seconds())


def an_hour(**fields: object) -> AttemptTime:
    """An attempt of an hour: a minute in the queue, a minute of image pull, and then node 0's own account."""
    return AttemptTime(
        **{
            "recorded": later(0),
            "scheduled": later(60),
            "began": later(120),
            "ended": later(3590),
            "closed": later(3600),
            "spent": Spent(start=100, restore=20, train=3000, evaluate=200, save=150, redo=0),
            "step": 100,
            "checkpoint_step": 100,
            **fields,
        }
    )


def test_each_second_of_an_attempt_is_where_it_belongs() -> None:
    assert parts(with_attempt(None, an_hour())) == {
        "queue": 60,
        "start": 160,
        "train": 3000,
        "evaluate": 200,
        "save": 150,
        "restore": 20,
        "redo": 0,
        "down": 10,
    }
    assert with_attempt(None, an_hour()).percent == 83


def test_steps_beyond_the_newest_checkpoint_were_for_nothing() -> None:
    cut = parts(with_attempt(None, an_hour(resumed_from_step=20, step=100, checkpoint_step=80)))
    assert (cut["train"], cut["redo"]) == (2250, 750)
    done = parts(with_attempt(None, an_hour(step=100, checkpoint_step=80, cut_off=False)))
    assert (done["train"], done["redo"]) == (3000, 0)


@pytest.mark.parametrize(
    ("resumed", "checkpoint", "redo"),
    [(None, None, 3000), (40, None, 3000), (40, 40, 3000), (40, 20, 3000), (0, 50, 1500)],
)
def test_an_attempt_without_a_new_checkpoint_made_all_its_steps_for_nothing(
    resumed: int | None, checkpoint: int | None, redo: int
) -> None:
    cut = an_hour(resumed_from_step=resumed, checkpoint_step=checkpoint)
    assert parts(with_attempt(None, cut))["redo"] == redo


def test_what_a_guard_threw_away_is_redo() -> None:
    spent = Spent(start=100, train=2000, redo=1000)
    assert parts(with_attempt(None, an_hour(spent=spent)))["redo"] == 1000


def test_steps_that_a_later_attempt_starts_before_were_for_nothing_too() -> None:
    one = with_attempt(None, an_hour(step=100, checkpoint_step=100))
    second = {name: later(5000 + seconds) for name, seconds in (("recorded", 0), ("began", 0), ("closed", 1000))}
    spent = Spent(train=900)
    back = an_hour(**second, scheduled=None, ended=None, spent=spent, resumed_from_step=70, step=100, saved_before=100)
    two = parts(with_attempt(one, back))
    # 30 steps of the first hour are made again; they took as long as the second attempt's 30.
    assert (two["train"], two["redo"]) == (3000 - 900 + 900, 900)
    far = an_hour(**second, scheduled=None, ended=None, spent=spent, resumed_from_step=0, step=1, saved_before=2**31)
    assert parts(with_attempt(one, far))["redo"] == 3000, "never more than there was"
    fresh = an_hour(**second, scheduled=None, ended=None, spent=spent, step=30, saved_before=100)
    assert parts(with_attempt(one, fresh))["redo"] == 0, "nobody knows where it went on from"


def test_an_attempt_that_never_found_a_node_was_in_the_queue_all_the_time() -> None:
    waiting = an_hour(scheduled=None, began=None, ended=None, spent=None)
    assert parts(with_attempt(None, waiting))["queue"] == 3600


def test_an_attempt_whose_container_never_ran_was_starting() -> None:
    pulling = parts(with_attempt(None, an_hour(began=None, ended=None, spent=None)))
    assert (pulling["queue"], pulling["start"], pulling["down"]) == (60, 3540, 0)


def test_what_nobody_can_account_for_is_down_time() -> None:
    silent = parts(with_attempt(None, an_hour(ended=None, spent=None)))
    assert (silent["start"], silent["down"]) == (60, 3480)


def test_the_time_between_attempts_is_down_time_and_suspension_is_not_counted() -> None:
    one = with_attempt(None, an_hour())
    after_rest = with_gap(one, later(9000), suspended_since=later(3700))
    assert after_rest is not None
    assert parts(after_rest)["down"] - parts(one)["down"] == 100
    two = with_attempt(
        after_rest, an_hour(recorded=later(9030), scheduled=None, began=None, ended=None, closed=later(9040))
    )
    assert parts(two)["down"] - parts(one)["down"] == 130
    assert sum(parts(two).values()) == 3600 + 130 + 10
    assert with_gap(None, later(5)) is None


def test_a_pod_cannot_claim_more_time_than_its_container_ran() -> None:
    boast = an_hour(spent=Spent(train=2**31, evaluate=2**30))
    found = with_attempt(None, boast)
    assert sum(parts(found).values()) == 3600
    assert (parts(found)["train"], parts(found)["evaluate"]) == (2313, 1157)


@dataclass
class History:
    """A random life of a job: what was accounted, and how long it really was without suspension."""

    found: Goodput | None
    wall: int
    trained: float


def random_time(dice: random.Random, after: datetime, most: int) -> datetime:
    return after + timedelta(seconds=dice.randint(0, most))


def random_life(dice: random.Random) -> History:
    """Attempts, gaps and rests in any order; times that were never seen, clocks that are off, hostile words."""
    found: Goodput | None = None
    now = first = later(dice.randint(0, 100))
    suspended, trained = 0, 0.0
    for _ in range(dice.randint(1, 8)):
        recorded = now if found is None else random_time(dice, now, 500)
        marks = [random_time(dice, recorded, 5000) if dice.random() < 0.85 else None for _ in range(3)]
        closed = random_time(dice, recorded, 5000)
        spent = None
        if dice.random() < 0.8:
            most = dice.choice((10, 1000, 10_000, 2**31))
            spent = Spent(**{name: dice.uniform(0, most) for name in Spent.model_fields})
            trained += spent.train
        steps = [dice.choice((None, dice.randint(0, 2**31), dice.randint(0, 50))) for _ in range(3)]
        saved = dice.choice((None, -1, dice.randint(0, 100)))
        attempt = AttemptTime(recorded, *marks, closed, spent, *steps, dice.random() < 0.7, saved)
        found, now = with_attempt(found, attempt), closed
        if dice.random() < 0.4:
            since = random_time(dice, now, 300)
            now = random_time(dice, since, 100_000)
            suspended += int((now - since).total_seconds())
            found = with_gap(found, now, since)
    return History(found, int((now - first).total_seconds()) - suspended, trained)


@pytest.mark.parametrize("seed", range(4))
def test_the_parts_add_up_to_the_wall_time_in_every_history(seed: int) -> None:
    dice = random.Random(seed)
    for number in range(HISTORIES // 4):
        life = random_life(dice)
        assert life.found is not None
        values = parts(life.found)
        assert sum(values.values()) == life.wall, f"history {number} of seed {seed}"
        assert all(value >= 0 for value in values.values()), values
        assert values["train"] + values["redo"] <= life.wall
        assert values["train"] <= life.trained + 8, "more training than the attempts ever spoke of"
        assert 0 <= life.found.percent <= 100
