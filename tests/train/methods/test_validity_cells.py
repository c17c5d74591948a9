"""Each cell of the validity table that no rule refuses runs: two steps at tiny size, to an artifact.

One process is tried on each change in FP32 and BF16 by turns; the other precision, FP4 and ZeRO (two processes, FP32 and
BF16 by turns) by `make test-train-full`. A CPU pool refuses FP16: see test_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.job import Precision, QuantizationType
from finetune_api.validity import Cell
from tests.train.methods.cells import allowed, cell_case, cell_name

_PLAIN = allowed(zero_stage=0, on_cpu=True)


def _sharded() -> Iterator[Cell]:
    """Each cell of each stage in one of its two precisions, by turns."""
    for stage in (1, 2, 3):
        found = [allowed(zero_stage=stage, on_cpu=True, precision=kind) for kind in (Precision.FP32, Precision.BF16)]
        for number, both in enumerate(zip(*found, strict=True)):
            yield both[(number + stage) % 2]


def _marked() -> list[object]:
    found: list[object] = []
    for number, cell in enumerate(_PLAIN):
        # Both precisions of a cell stand side by side: one of the two on each change.
        first = (number // 2 + number) % 2 == 0 and cell.quantization is not QuantizationType.FP4
        found.append(pytest.param(cell, id=cell_name(cell), marks=[] if first else [pytest.mark.slow]))
    found += [pytest.param(cell, id=cell_name(cell), marks=[pytest.mark.slow]) for cell in _sharded()]
    return found


@pytest.mark.parametrize("cell", _marked())
def test_an_allowed_cell_runs_to_its_artifact(cell: Cell, tmp_path: Path) -> None:
    work = cell_case(cell).work(tmp_path / "run")
    assert work.train() == [0] * work.run.world_size, work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert len(losses) == work.run.hyperparameters.total_steps
    assert all(math.isfinite(loss) for loss in losses)
    evaluation = work.read("artifact/report.json")["evaluation"]
    assert math.isfinite(evaluation["tuned"]["loss"])
