"""What is drawn at random while training: each rank draws its own, and no weight or order of records depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.train.methods.case import Case, merged
from tests.train.methods.cases_reinforcement import CASES as REINFORCEMENT
from tests.train.methods.cases_reinforcement import prompts
from tests.train.worker.runs import LORA, Work, build_engine_in, launch, records

# The same record everywhere: with equal weights, only what a rank draws can tell it from another.
ALIKE = [records(1)[0] for _ in range(20)]
NOISY: dict[str, Any] = {
    "dataset": {"validationFraction": None},
    "tuning": {"lora": {**LORA, "dropout": 0.5}},
    "hyperparameters": {"neftuneAlpha": 5.0, "microBatchSize": 2, "gradientAccumulation": 1},
    "checkpoint": {"everySteps": 2},
}
STEPS = 4


def _work(root: Path, processes: int, rows: list[dict[str, str]] = ALIKE) -> Work:
    work = Case("noisy", {}, rows, merged(NOISY, {"resources": {"processesPerNode": processes}})).work(root)
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


def _seen(work: Work) -> list[Any]:
    """Of each rank: what _look wrote."""
    assert launch(_look, work.run.world_size, str(work.root)) == [0] * work.run.world_size
    return [np.load(work.root / f"seen-{rank}.npz") for rank in range(work.run.world_size)]


def _look(root: str, env: dict[str, str]) -> int:
    """Train; seen-<rank>.npz has the tokens, the noised embeddings and the dropout mask of each step, and the weights."""
    from peft.tuners.lora import LoraLayer

    engine = build_engine_in(root)
    layer = engine.model.get_base_model().model.layers[0]
    adapted = next(module for module in layer.modules() if isinstance(module, LoraLayer))
    found: dict[str, list[Any]] = {"tokens": [], "embedded": [], "kept": []}

    def note(name: str, value: Any) -> None:
        if engine.model.training:
            found[name].append(value.detach().numpy())

    engine.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: note("tokens", a[0]))
    layer.register_forward_pre_hook(lambda _, a: note("embedded", a[0]))
    adapted.lora_dropout["default"].register_forward_hook(lambda _, a, output: note("kept", output != 0))
    engine.train()
    weights = np.concatenate([p.detach().numpy().ravel() for p in engine.model.parameters()])
    np.savez(f"{root}/seen-{env['RANK']}.npz", weights=weights, **{name: np.stack(v) for name, v in found.items()})
    return 0


def test_ranks_drop_and_noise_otherwise_and_keep_equal_weights(tmp_path: Path) -> None:
    first, second = _seen(_work(tmp_path / "two", 2))
    (alone,) = _seen(_work(tmp_path / "one", 1))
    assert len(first["kept"]) == STEPS
    assert np.array_equal(first["tokens"], second["tokens"]), "both read the same text"
    for step in range(STEPS):
        agree = np.mean(first["kept"][step] == second["kept"][step])
        assert 0.4 < agree < 0.6, "half of what is dropped agrees by chance"
        assert not np.array_equal(first["embedded"][step], second["embedded"][step])
    assert np.array_equal(first["weights"], second["weights"])
    assert np.array_equal(first["kept"], alone["kept"]), "the first rank draws as a lone process does"
    assert np.array_equal(first["embedded"], alone["embedded"])


def test_two_ranks_with_dropout_resume_each_with_its_own_random_state(tmp_path: Path) -> None:
    whole = _work(tmp_path / "whole", 2, records(24))
    assert whole.train() == [0, 0], whole.logged()
    resumed = whole.resumed_from(whole, 2, tmp_path / "resumed")
    assert resumed.train() == [0, 0], resumed.logged()
    assert resumed.losses("checkpoints/step-4") == whole.losses("checkpoints/step-4")
    assert len(whole.losses("checkpoints/step-4")) == STEPS


def test_ranks_write_other_answers_to_the_same_prompt(tmp_path: Path) -> None:
    case = next(case for case in REINFORCEMENT if case.name == "grpo-lora")
    changes = {"dataset": {"validationFraction": None}, "resources": {"processesPerNode": 2}}
    work = case.work(tmp_path / "w", changes, [prompts(1)[0]] * 24)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    assert launch(_write, 2, str(work.root)) == [0, 0]
    first, second = (json.loads((work.root / f"written-{rank}.json").read_text()) for rank in (0, 1))
    assert first["prompts"] == second["prompts"]
    answers = [{tuple(answer) for answer in rank["answers"]} for rank in (first, second)]
    assert len(first["answers"]) >= 8
    assert len(answers[0] & answers[1]) <= len(answers[0]) // 4, "eight tokens of random weights are hardly met twice"


def _write(root: str, env: dict[str, str]) -> int:
    """The first step's prompts and the tokens of their answers go to written-<rank>.json."""
    from itertools import islice

    engine = build_engine_in(root)
    batches = list(islice(engine.get_train_dataloader(), engine.split.accumulation))
    written = engine.objective.roll_out(engine, batches)
    found = {
        "prompts": [batch["input_ids"].tolist() for batch in batches],
        "answers": [row[row != -100].tolist() for batch in written for row in batch["labels"]],
    }
    Path(root, f"written-{env['RANK']}.json").write_text(json.dumps(found))
    return 0
