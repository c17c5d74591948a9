"""Golden loss curves: each method's first steps, as text. `python -m tests.train.methods` writes them again.

Another machine gives them to within a thousandth. The same machine repeats a run to the bit, by `make test-train-full`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases import CASES
from tests.train.methods.golden import curve, read_golden

# Another machine has other kernels, which add up in another order.
ACROSS_MACHINES = 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_steps_give_the_checked_in_losses(case: Case, tmp_path: Path) -> None:
    found = curve(case, tmp_path / "run")
    expected = read_golden(case.name)
    assert len(found) == len(expected)
    for (step, loss), (wanted_step, wanted) in zip(found, expected, strict=True):
        assert step == wanted_step
        assert loss == pytest.approx(wanted, rel=ACROSS_MACHINES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_process_of_the_same_machine_gives_the_same_losses_to_the_bit(case: Case, tmp_path: Path) -> None:
    assert curve(case, tmp_path / "one") == curve(case, tmp_path / "other")
