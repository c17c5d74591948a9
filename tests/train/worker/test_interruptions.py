"""A stop that comes while a model is measured: honoured at the next batch, and nothing that was made is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_preference import CASES
from tests.train.methods.cases_reinforcement import CASES as REINFORCEMENT
from tests.train.worker.runs import Work, build_engine_in, in_child, launch, records

STOPPED = 100


def evaluated(root: Path, processes: int = 1) -> Work:
    """A run of four steps, measured at the second one and never saved before its end."""
    return Case(
        "interrupted",
        {},
        records(),
        {
            "evaluation": {"everySteps": 2},
            "hyperparameters": {"microBatchSize": 1, "gradientAccumulation": 2},
            "resources": {"processesPerNode": processes},
        },
    ).work(root)


def written(work: Work) -> Work:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_within_an_evaluation_saves_the_step_and_leaves_the_evaluation_for_later(
    tmp_path: Path, processes: int
) -> None:
    work = written(evaluated(tmp_path / "w", processes))
    assert launch(_train_and_stop_in_evaluation, processes, str(work.root)) == [STOPPED] * processes
    state = work.read("checkpoints/step-2/trainer_state.json")
    assert state["global_step"] == 2
    assert not any("eval_loss" in entry and entry["step"] == 2 for entry in state["log_history"])

    whole = evaluated(tmp_path / "whole", processes)
    resumed = whole.resumed_from(work, 2, tmp_path / "resumed")
    assert resumed.train() == [0] * processes, resumed.logged()
    assert whole.train() == [0] * processes, whole.logged()
    assert resumed.losses("checkpoints/step-4") == whole.losses("checkpoints/step-4")
    assert _evaluations(resumed) == _evaluations(whole)


def _evaluations(work: Work) -> list[tuple[int, float]]:
    return [(line["step"], line["evalLoss"]) for line in work.metrics() if "evalLoss" in line]


def _train_and_stop_in_evaluation(root: str, env: dict[str, str]) -> int:
    """The worker, whose first rank is asked to stop as the evaluation of step 2 begins."""
    os.environ.update(env)
    from finetune_trainer.worker.engine import Engine
    from finetune_trainer.worker.main import main

    plain = Engine.measure

    def measure(self: Any, dataloader: Any) -> Any:
        if self.state.global_step == 2 and env["RANK"] == "0":
            self.supervision.work.stop_file.touch()
        return plain(self, dataloader)

    Engine.measure = measure  # type: ignore[method-assign]
    return main(["--run-file", f"{root}/run.json", "--work", root])


def test_a_stop_while_completions_are_written_saves_the_last_step(tmp_path: Path) -> None:
    case = next(case for case in REINFORCEMENT if case.name == "grpo-lora")
    changes = {"hyperparameters": {"totalSteps": 4, "microBatchSize": 1, "gradientAccumulation": 4}}
    work = written(case.work(tmp_path / "w", changes))
    assert launch(_train_and_stop_in_roll_out, 1, str(work.root)) == [STOPPED]
    assert work.read("completions.json") == [0, 1, 2], "the third step's first micro batch is the last one"
    whole = case.work(tmp_path / "whole", changes)
    resumed = whole.resumed_from(work, 2, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    assert whole.train() == [0], whole.logged()
    assert resumed.losses("checkpoints/step-4") == whole.losses("checkpoints/step-4")


def _train_and_stop_in_roll_out(root: str, env: dict[str, str]) -> int:
    """The worker, which is asked to stop with the first completions of the third step."""
    os.environ.update(env)
    from finetune_trainer.worker.main import main
    from finetune_trainer.worker.objectives.online import Online

    plain, steps = Online._written, []

    def write(self: Any, prompts: Any, step: int, number: int) -> Any:
        steps.append(step)
        if step == 2:
            self.engine.supervision.work.stop_file.touch()
        return plain(self, prompts, step, number)

    Online._written = write  # type: ignore[method-assign]
    code = main(["--run-file", f"{root}/run.json", "--work", root])
    Path(root, "completions.json").write_text(json.dumps(sorted(set(steps)) if steps.count(2) == 1 else steps))
    return code


def test_a_stop_ends_the_reading_of_the_data(tmp_path: Path) -> None:
    work = evaluated(tmp_path / "w")
    work.root.joinpath("control").mkdir()
    work.root.joinpath("control/stop").touch()
    assert work.train() == [STOPPED], work.logged()
    assert "while the data was read" in work.read("state/error-0.json")["message"]
    assert not list(work.root.glob("checkpoints/step-*"))


def test_a_stop_ends_the_writing_of_answers(tmp_path: Path) -> None:
    work = written(evaluated(tmp_path / "w"))
    assert in_child(_batches_after_a_stop, str(work.root)) == 1


def _batches_after_a_stop(root: str) -> int:
    """How many batches of prompts are answered when the stop comes with the first of three."""
    import numpy as np

    from finetune_trainer.worker.evaluate.generation import Generator
    from finetune_trainer.worker.faults import Stopped

    engine = build_engine_in(root)
    generator = Generator(engine.objective.run.evaluation.generation, engine.objective.tokenizer, 7)
    plain, made = engine.model.generate, []

    def generate(**arguments: Any) -> Any:
        made.append(1)
        engine.supervision.work.stop_file.touch()
        return plain(**arguments)

    engine.model.generate = generate
    with pytest.raises(Stopped):
        generator.answers(engine, [np.array([5, 6, 7], np.int32)] * 20)
    return len(made)


def test_a_resumed_kto_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    """The divergence of a step is estimated over all of its records, in the first step after a resume too."""
    case = next(case for case in CASES if case.name == "kto-lora")
    changes = {"hyperparameters": {"totalSteps": 3}, "checkpoint": {"everySteps": 1}}
    whole = case.work(tmp_path / "whole", changes)
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 1, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    assert resumed.losses("checkpoints/step-3") == whole.losses("checkpoints/step-3")
