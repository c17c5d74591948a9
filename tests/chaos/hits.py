"""Hits: a signal at a random moment in the life of an attempt, and what is known about the attempt at that moment."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.runs import SAVE_STEPS, Attempt

STOP, KILL = "stop", "kill"


@dataclass(frozen=True)
class Moment:
    """When to hit: up to `within` seconds after the attempt came so far. weight: how often it is drawn."""

    name: str
    weight: int
    within: float
    came: Callable[[Attempt], bool]


def _has_workers(attempt: Attempt) -> bool:
    return bool(attempt.agent.events("workers started"))


def _in(stage: str) -> Callable[[Attempt], bool]:
    return lambda attempt: attempt.stage() == stage


def _has_a_save_due(attempt: Attempt) -> bool:
    return any(line.step is not None and line.step % SAVE_STEPS == 0 for line in attempt.lines())


# The times are those of the stages on an idle machine of two cores, a little more than that.
MOMENTS = (
    Moment("start", 12, 1.5, lambda attempt: True),
    Moment("loading", 12, 0.8, _has_workers),
    Moment("training", 40, 4.5, _in("Training")),
    Moment("saving", 20, 0.25, _has_a_save_due),
    Moment("evaluating", 6, 0.1, lambda attempt: attempt.stage() == "Evaluating" and bool(attempt.steps())),
    Moment("publishing", 10, 0.9, _in("Publishing")),
)


@dataclass(frozen=True)
class Plan:
    """A hit to come. plain: on an attempt whose worker starts from a bare interpreter."""

    how: str
    moment: Moment
    delay: float
    plain: bool = False


@dataclass(frozen=True)
class Hit:
    """What was hit.

    stage: the worker's at that moment. reached: the last step that was made, counted from the base model. stored: the
    newest step whose checkpoint the agent had said to be stored, 0 for none. behind: how many due checkpoints were not
    stored yet, and waiting: for how many seconds the oldest of them. seconds: from the signal to the end.
    """

    plan: Plan
    stage: str
    reached: int
    stored: int
    behind: int
    waiting: float
    exit_code: int
    seconds: float


def draw(stops: int, kills: int, plain: int, draws: random.Random) -> list[Plan]:
    """The hits of a soak in random order; plain of them, at most, are on plain attempts."""
    plans = []
    for how in (STOP,) * stops + (KILL,) * kills:
        moment = draws.choices(MOMENTS, [moment.weight for moment in MOMENTS])[0]
        plans.append(Plan(how, moment, draws.uniform(0, moment.within)))
    draws.shuffle(plans)
    chosen = set(draws.sample(range(len(plans)), min(plain, len(plans))))
    return [Plan(p.how, p.moment, p.delay, number in chosen) for number, p in enumerate(plans)]


def strike(attempt: Attempt, plan: Plan) -> Hit | None:
    """Hits the running attempt as planned; None if it ended before."""
    if not attempt.wait_for(lambda: plan.moment.came(attempt)):
        return None
    due = time.monotonic() + plan.delay
    if not attempt.wait_for(lambda: time.monotonic() >= due):
        return None
    if plan.how == STOP and not attempt.wait_for(attempt.can_be_stopped):
        return None
    begun = time.monotonic()
    if plan.how == STOP:
        assert attempt.agent.process is not None
        attempt.agent.process.send_signal(signal.SIGTERM)
        attempt.agent.finish()
    else:
        attempt.kill()
    seconds = time.monotonic() - begun
    return _seen(attempt, plan, begun, seconds)


def _seen(attempt: Attempt, plan: Plan, moment: float, seconds: float) -> Hit:
    assert attempt.agent.process is not None
    lines = attempt.lines()
    before = [line for line in lines if line.time <= moment]
    resumed = attempt.resumed_from() if attempt.begun() else 0
    reached = max([line.step for line in lines if line.step is not None], default=resumed)
    stored = max(attempt.stored(), default=resumed)
    due = [line for line in lines if line.step and line.step > stored and line.step % SAVE_STEPS == 0]
    return Hit(
        plan,
        stage=next((line.stage for line in reversed(before) if line.stage), "Starting"),
        reached=reached,
        stored=stored,
        behind=len(due),
        waiting=max((moment - line.time for line in due), default=0.0),
        exit_code=attempt.agent.process.returncode,
        seconds=seconds,
    )
