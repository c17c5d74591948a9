"""Each method learns a task made for it. On each change a few; all by `make test-train-full`."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.metrics import step_metrics
from tests.train.methods.case import Case, merged
from tests.train.methods.cases import CASES

ON_EACH_CHANGE = ("supervised-lora", "classification-full", "dpo-lora", "grpo-lora")


def _marked(case: Case) -> object:
    marks = [] if case.name in ON_EACH_CHANGE else [pytest.mark.slow]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [_marked(case) for case in CASES if case.learning])
def test_the_tuned_model_reaches_a_score_that_the_base_does_not(case: Case, tmp_path: Path) -> None:
    learning = case.learning
    assert learning is not None
    work = case.work(tmp_path / "run", merged({}, learning.changes), learning.rows)
    assert work.train() == [0] * work.run.world_size, work.logged()
    evaluation = work.read("artifact/report.json")["evaluation"]
    base, tuned = evaluation["base"][learning.metric], evaluation["tuned"][learning.metric]
    print(f"{case.name}: {learning.metric} {base:.4g} -> {tuned:.4g}")
    offered = step_metrics(work.run.objective.type, work.run.model.task)
    assert set(offered) <= set(evaluation["tuned"]), "each of them may choose the best step"
    sign = 1 if learning.higher else -1
    assert sign * base < sign * learning.base
    assert sign * tuned >= sign * learning.tuned
