"""What is measured and published is what the settings say, whatever the base's own files add to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_experts import CASES
from tests.train.worker.runs import FULL, build_engine_in, in_child, records, work_for
from tests.train.worker.test_features_best import STOP, _same, worsening

# As vicuna and the first chat models of Llama 2 have it: sampling flags without do_sample.
SLOPPY = {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 3.0, "eos_token_id": 1, "bos_token_id": 0}


def test_a_best_step_that_is_found_on_resume_is_the_one_published(tmp_path: Path) -> None:
    """Stopped between the best step and its evaluation: its weights are kept, not those of the best one before."""
    whole = worsening(tmp_path / "w", **STOP)
    assert whole.train() == [0], whole.logged()
    best = whole.read("artifact/report.json")["training"]["publishedStep"]
    earlier = best - 2
    assert whole.read(f"checkpoints/step-{earlier}.ready")["best"] == [earlier], "a best one of its time"

    resumed = whole.resumed_from(whole, best, tmp_path / "resumed")
    shutil.copytree(whole.root / f"checkpoints/step-{earlier}", resumed.root / "best")
    carried, state = resumed.read("resume/run.json"), resumed.read("resume/trainer_state.json")
    before = whole.read(f"checkpoints/step-{earlier}/run.json")
    carried |= {name: before[name] for name in ("best", "waited", "stopped_early")}
    (resumed.root / "resume/run.json").write_text(json.dumps(carried))
    state["log_history"] = [e for e in state["log_history"] if not ("eval_loss" in e and e["step"] == best)]
    (resumed.root / "resume/trainer_state.json").write_text(json.dumps(state))

    assert resumed.train() == [0], resumed.logged()
    assert resumed.read("artifact/report.json")["training"]["publishedStep"] == best
    assert in_child(_same, str(whole.root / "artifact/adapter"), str(resumed.root / "artifact/adapter"))


def test_a_base_with_contradictory_generation_settings_is_trained_and_saved(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", saveSteps=2, **FULL)
    (work.root / "inputs/model/generation_config.json").write_text(json.dumps(SLOPPY))
    assert work.train() == [0], work.logged()
    assert work.read("artifact/model/generation_config.json") == SLOPPY, "as the base has them"


# Ends an answer with a special token that is not the tokenizer's end token, as ChatML on a base model does.
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<pad>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("changes", [{}, FULL], ids=["adapter", "model"])
def test_a_model_that_learnt_a_chats_end_token_stops_at_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In our own answers, and wherever the artifact is loaded: the base's settings name its own end token only."""
    work = work_for(tmp_path / "w", totalSteps=1, **changes)
    tokenizer = work.root / "inputs/model/tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "chat_template": CHAT}))
    settings = work.root / "inputs/model/generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))
    assert work.train() == [0], work.logged()
    folder = "model" if changes else "adapter"
    assert work.read(f"artifact/{folder}/generation_config.json") == {"eos_token_id": [1, 2], "bos_token_id": 0}
    assert in_child(_ends, str(work.root)) == [1, 2]


def _ends(root: str) -> list[int]:
    from finetune_trainer.worker.evaluate.generation import Generator

    engine = build_engine_in(root)
    generator = Generator(engine.objective.run.evaluation.generation, engine.objective.tokenizer, 7)
    return list(generator._config(engine.model, 3).eos_token_id)


def test_answers_follow_the_settings_of_the_spec_alone(tmp_path: Path) -> None:
    work = Case("answers", {}, records(), {}).work(tmp_path / "w")
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    plain, penalised = in_child(_answers, str(work.root))
    assert penalised == plain
    assert all(plain)


def _answers(root: str) -> tuple[list[str], list[str]]:
    import numpy as np

    from finetune_trainer.worker.evaluate.generation import Generator

    engine = build_engine_in(root)
    generator = Generator(engine.objective.run.evaluation.generation, engine.objective.tokenizer, 7)
    prompts = [np.array([5 + k, 6, 7], np.int32) for k in range(8)]
    found = [generator.answers(engine, prompts)]
    engine.model.generation_config.repetition_penalty = 8.0
    engine.model.generation_config.min_length = 12
    found.append(generator.answers(engine, prompts))
    return found[0], found[1]


def test_a_process_without_a_record_adds_nothing_to_the_routers_balance(tmp_path: Path) -> None:
    work = next(case for case in CASES if "qwen2_moe" in case.name).work(tmp_path / "w")
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    empty, full, beside_empty = in_child(_losses, str(work.root))
    assert empty == 0.0
    assert full > 0.0
    assert full == pytest.approx(beside_empty), "a pass without records does not make the balance weigh less"


def _losses(root: str) -> tuple[float, ...]:
    import torch

    from finetune_trainer.worker.router import router_weight

    engine = build_engine_in(root)
    engine.accelerator.gradient_state._set_sync_gradients(False)
    assert router_weight(engine.model, engine.objective.run) > 0
    one = torch.ones((), dtype=torch.float64)
    none, some = engine.objective.collate([]), engine.objective.collate([engine._records[0]])
    found = []
    for step, batch in (([some], none), ([some], some), ([some, none], some)):
        engine._get_num_items_in_batch(step, torch.device("cpu"))
        whole = engine.compute_loss(engine.model, batch, num_items_in_batch=one)
        found.append(float(whole) - float(engine.objective.loss_sum(engine.model, batch).total))
    return tuple(found)
