"""A run that goes on with another number of processes: the same records in each step, and what cannot go on refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.agent.output_store import claim_of
from tests.train.methods.cases_reinforcement import CASES as REINFORCEMENT
from tests.train.worker.runs import FULL, LORA, Work, build_engine_in, in_child, run_file, work_for

# Two processes pass 2 records each at once, a lone one the same 4 in one pass or in four: 5 steps an epoch.
TWO = {"processesPerNode": 2, "microBatchSize": 2, "gradientAccumulation": 1}
ONE = {"processesPerNode": 1, "microBatchSize": 1, "gradientAccumulation": 4}
STEPS = 20


def _run(root: Path, **changes: Any) -> Work:
    return work_for(root, **{"totalSteps": STEPS, "saveSteps": 7, "evaluateSteps": 10, **changes})


@pytest.mark.parametrize("method", [{"type": "LoRA"}, pytest.param(FULL, marks=pytest.mark.slow)])
def test_two_processes_then_one_then_two_repeat_the_straight_run(tmp_path: Path, method: dict[str, Any]) -> None:
    """Within 1e-5: the sums are the same and only their order differs. Steps 7 and 14 lie within an epoch."""
    straight = _run(tmp_path / "straight", **TWO, **method)
    assert straight.train() == [0, 0], straight.logged()
    alone = _run(tmp_path / "a", **ONE, **method).resumed_from(straight, 7, tmp_path / "alone")
    assert alone.train() == [0], alone.logged()
    again = straight.resumed_from(alone, 14, tmp_path / "again")
    assert again.train() == [0, 0], again.logged()

    last = f"checkpoints/step-{STEPS}"
    expected, found = straight.losses(last), again.losses(last)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert found[:7] == expected[:7]
    assert found[7:14] == alone.losses(last)[7:14]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
    assert [norm for _, _, norm in found] == pytest.approx([norm for _, _, norm in expected], rel=1e-4)
    assert [line["learningRate"] for line in again.metrics() if "loss" in line] == [
        line["learningRate"] for line in straight.metrics() if "loss" in line
    ]
    assert again.read(f"{last}/run.json")["tokens"] == straight.read(f"{last}/run.json")["tokens"]
    assert again.read("artifact/report.json")["evaluation"]["tuned"]["loss"] == pytest.approx(
        straight.read("artifact/report.json")["evaluation"]["tuned"]["loss"], rel=1e-5
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A run of one process with dropout and a checkpoint within an epoch."""
    work = work_for(tmp_path_factory.mktemp("saved") / "w", saveSteps=2, lora={**LORA, "dropout": 0.2})
    assert work.train() == [0], work.logged()
    return work


def test_the_random_states_of_other_processes_come_from_seed_step_and_rank(tmp_path: Path, saved: Work) -> None:
    folder = str(saved.root / "checkpoints/step-2")
    stored, first = in_child(_drawn, folder, 1, 0), in_child(_drawn, folder, 2, 0)
    assert in_child(_drawn, folder, 1, 0) == stored
    assert in_child(_drawn, folder, 2, 0) == first != stored
    assert in_child(_drawn, folder, 2, 1) not in (first, stored), "two processes drop other activations"
    # The rule, written out: NumPy's SeedSequence over (seed, step, rank) seeds Python, NumPy and torch.
    assert first == in_child(_seeded, 7, 2, 0)


def _drawn(folder: str, world_size: int, rank: int) -> tuple[float, float, float]:
    """Numbers drawn after rank of world_size processes has taken up its random state."""
    from types import SimpleNamespace

    from finetune_trainer.worker.engine import Engine
    from finetune_trainer.worker.ranks import Ranks

    engine = Engine.__new__(Engine)
    engine.supervision = SimpleNamespace(ranks=Ranks(rank, rank, world_size, world_size))
    engine.state = SimpleNamespace(global_step=2)
    engine.args = SimpleNamespace(seed=7, world_size=world_size, process_index=rank, parallel_mode=None)
    engine._load_rng_state(folder)
    return _numbers()


def _seeded(*parts: int) -> tuple[float, float, float]:
    import numpy as np
    from transformers import set_seed

    set_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
    return _numbers()


def _numbers() -> tuple[float, float, float]:
    import random

    import numpy as np
    import torch

    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_checkpoint_of_a_process_with_gpus_does_not_lend_its_random_state(tmp_path: Path, saved: Work) -> None:
    resumed = saved.resumed_from(saved, 2, tmp_path / "resumed")
    assert in_child(_fits, str(resumed.root / "resume"), False)
    assert not in_child(_fits, str(resumed.root / "resume"), True)


def _fits(folder: str, on_gpus: bool) -> bool:
    import torch
    from transformers.trainer_pt_utils import safe_globals

    from finetune_trainer.worker.ranks import Ranks
    from finetune_trainer.worker.resume import random_state_fits

    path = Path(folder) / "rng_state.pth"
    with safe_globals():
        states = torch.load(path, weights_only=True)
    if on_gpus:
        torch.save({**states, "cuda": [states["cpu"]] * 2}, path)
    return random_state_fits(Path(folder), Ranks(0, 0, 1, 1))


def test_completions_of_other_processes_are_left_and_drawn_anew(tmp_path: Path) -> None:
    """Within a set of GRPO: those of rank 0 of two processes would fill half of a lone one's step."""
    case = next(case for case in REINFORCEMENT if case.name == "grpo-full")
    changes = {"hyperparameters": {"totalSteps": 3}, "checkpoint": {"everySteps": 3}}
    work = case.work(tmp_path / "w", changes)
    assert work.train() == [0], work.logged()
    assert in_child(_windows, str(work.root)) == (2, 0)


def _windows(root: str) -> tuple[int, int]:
    """How many batches of completions are taken up from a checkpoint of one process, and from one of two."""
    import json

    engine = build_engine_in(root)
    engine.state.global_step = 3
    folder, found = Path(root) / "checkpoints/step-3", []
    for processes in (1, 2):
        (folder / "plan.json").write_text(json.dumps({"worldSize": processes, "step": 3}))
        engine.objective.window = []
        engine.objective.load_state(folder)
        found.append(len(engine.objective.window))
    return found[0], found[1]


def test_the_same_run_with_other_processes_owns_the_output_and_another_batch_does_not() -> None:
    one, two, larger = run_file(**ONE), run_file(**TWO), run_file(**{**TWO, "gradientAccumulation": 2})
    assert claim_of(one).method_digest == claim_of(two).method_digest != claim_of(larger).method_digest


def test_another_effective_batch_is_refused_with_both_numbers(tmp_path: Path, saved: Work) -> None:
    other = work_for(tmp_path / "other", gradientAccumulation=4).resumed_from(saved, 2, tmp_path / "resumed")
    assert other.train() == [64], other.logged()
    error = other.read("state/error-0.json")
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.hyperparameters.globalBatchSize")
    assert "effective batch of 4 records, and this run has 8" in error["message"]


def test_other_records_than_the_checkpoint_stands_in_are_refused(tmp_path: Path, saved: Work) -> None:
    resumed = saved.resumed_from(saved, 2, tmp_path / "resumed")
    rows = (resumed.root / "inputs/data/0/train.jsonl").read_text().splitlines()
    (resumed.root / "inputs/data/0/train.jsonl").write_text("\n".join([*rows, rows[0].replace("say", "tell")]))
    assert resumed.train() == [87], resumed.logged()
    error = resumed.read("state/error-0.json")
    assert error["class"] == "CheckpointInvalid"
    assert "an epoch of 19 training sequences, and the data now gives 20" in error["message"]
