"""When a loss counts as gone wrong: late and surely rather than early and in vain."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from finetune_api.guards import RollbackReason
from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunGuards
from finetune_trainer.worker.guards import Finding, LossWatch

ON = RunGuards(loss_spike=LossSpikeGuard.ROLLBACK)
CURVES = Path(__file__).parent / "curves"


def first_alarm(losses: Iterable[float], settings: RunGuards = ON) -> tuple[int, Finding] | None:
    """The step of the first alarm and what was found."""
    watch = LossWatch(settings)
    for step, loss in enumerate(losses, start=1):
        if found := watch.see(step, loss):
            return step, found
    return None


def around(level: float, deviation: float, count: int, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, deviation) for _ in range(count)]


NOISE: dict[str, Callable[[random.Random, int], float]] = {
    "a batch of one: as wide as its level": lambda draw, step: abs(draw.gauss(2.0, 1.5)),
    "heavy tails": lambda draw, step: draw.lognormvariate(0.0, 1.0),
    "heavier tails": lambda draw, step: abs(draw.gauss(0, 1)) / max(1e-3, abs(draw.gauss(0, 1))),
    "two kinds of records": lambda draw, step: 8.0 if draw.random() < 0.2 else 0.4,
    "as many of either kind": lambda draw, step: draw.choice((0.2, 6.0)) + draw.random(),
    "rare records that are far off": lambda draw, step: 50.0 if draw.random() < 0.03 else 1.0 + 0.1 * draw.random(),
    "falls, and the noise with it": lambda draw, step: (6 / math.sqrt(1 + step / 20)) * draw.lognormvariate(0, 0.5),
    "falls with each epoch": lambda draw, step: 3.0 * 0.6 ** (step // 300) * draw.lognormvariate(0, 0.4),
    "learnt by heart, nearly zero": lambda draw, step: 1e-3 * draw.lognormvariate(0, 1.5),
    "negative": lambda draw, step: draw.gauss(-1.0, 0.8),
    "does not move": lambda draw, step: math.log(32_000) + draw.gauss(0, 0.05),
    "waves of a third, as where lengths differ from span to span": lambda draw, step: (
        2 + 0.3 * math.sin(step / 15) + draw.gauss(0, 0.3)
    ),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_of_any_kind_raises_no_alarm(kind: str) -> None:
    for seed in range(6):
        draw = random.Random(seed)
        found = first_alarm(NOISE[kind](draw, step) for step in range(2500))
        assert found is None, f"seed {seed}: {found}"


@pytest.mark.parametrize("name", sorted(path.stem for path in CURVES.glob("*.txt")))
def test_the_curve_of_a_real_run_raises_no_alarm_and_a_jump_in_it_does(name: str) -> None:
    """400 steps of a tiny model, one record each (KTO: two), recorded by the worker: as noisy as training gets."""
    losses = [float(line) for line in (CURVES / f"{name}.txt").read_text().splitlines()]
    assert len(losses) == 400
    assert first_alarm(losses) is None
    before, after = losses[:300], losses[300:]
    top = max(before[-64:])
    found = first_alarm([*before, *(loss + max(0.5, 1.5 * top) for loss in after)])
    assert found is not None
    assert (found[0], found[1].onset_step, found[1].reason) == (308, 301, RollbackReason.SPIKE)


def test_a_jump_that_stays_is_a_spike_with_its_first_step_as_the_onset() -> None:
    step, found = first_alarm([*around(2.0, 0.3, 200), *around(5.0, 0.3, 50)]) or (0, None)
    assert step == 208
    assert found is not None
    assert (found.reason, found.onset_step) == (RollbackReason.SPIKE, 201)
    assert found.before == pytest.approx(2.0, abs=0.2)
    assert found.now == pytest.approx(5.0, abs=0.3)


def test_a_jump_in_wide_noise_is_found_too() -> None:
    found = first_alarm([*around(2.0, 0.8, 300), *around(9.0, 0.8, 50)])
    assert found is not None
    assert found[0] == 308
    assert found[1].onset_step == 301


def test_seven_high_losses_in_a_row_are_noise_and_eight_are_not() -> None:
    calm = around(2.0, 0.1, 100)
    seven = [5.0] * 7
    assert first_alarm([*calm, *seven, 2.0, *seven, 2.0, *calm]) is None
    assert first_alarm([*calm, *seven, 5.0]) is not None


def test_a_jump_of_less_than_a_quarter_is_none() -> None:
    assert first_alarm([*around(2.0, 0.01, 100), *around(2.45, 0.01, 200)]) is None
    assert first_alarm([*around(2.0, 0.01, 100), *around(2.55, 0.01, 200)]) is not None


def test_a_loss_near_zero_may_rise_by_any_factor_below_a_tenth() -> None:
    assert first_alarm([*[0.001] * 100, *[0.09] * 100]) is None
    assert first_alarm([*[0.001] * 100, *[0.12] * 100]) is not None


def test_the_first_half_window_raises_no_alarm() -> None:
    assert first_alarm([*[2.0] * 10, *[9.0] * 50]) is None
    found = first_alarm([*[2.0] * 32, *[9.0] * 40])
    assert found is not None
    assert found[1].onset_step == 33


def test_a_slow_rise_that_stays_is_a_plateau() -> None:
    rising = [1.5 + min(step, 300) / 300 * 2.0 for step in range(600)]
    noise = around(0.0, 0.2, 900)
    losses = [level + extra for level, extra in zip([*[1.5] * 200, *rising], noise, strict=False)]
    step, found = first_alarm(losses) or (0, None)
    assert found is not None
    assert found.reason is RollbackReason.PLATEAU
    assert 200 < found.onset_step < 350, "within the rise"
    assert step == found.onset_step + 2 * 64 - 1
    assert found.before == pytest.approx(1.5, abs=0.1)


def test_a_run_that_goes_astray_in_its_first_steps_is_found_as_a_plateau() -> None:
    losses = [*around(2.0, 0.2, 40), *[2.0 + step / 10 for step in range(30)], *around(7.0, 0.2, 300)]
    found = first_alarm(losses)
    assert found is not None


def test_a_rise_that_passes_within_a_block_or_two_is_no_plateau() -> None:
    hump = [2.0 + 0.9 * math.sin(math.pi * step / 100) for step in range(100)]
    assert first_alarm([*around(2.0, 0.3, 200), *hump, *around(1.8, 0.3, 300)]) is None


@pytest.mark.parametrize("cut", [1, 40, 150, 203, 206])
def test_what_it_knows_follows_from_the_losses_alone_so_that_a_resume_changes_nothing(cut: int) -> None:
    losses = [*around(2.0, 0.3, 200), *around(5.0, 0.3, 50)]
    watch = LossWatch(ON)
    for step, loss in enumerate(losses[:cut], start=1):
        assert watch.see(step, loss) is None
    again = LossWatch(ON)
    for step, loss in enumerate(losses[:cut], start=1):
        again.see(step, loss)
    found = [again.see(step, loss) for step, loss in enumerate(losses[cut:], start=cut + 1)]
    assert next(k for k, one in enumerate(found, start=cut + 1) if one) == 208
