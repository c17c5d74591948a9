"""Runs of GRPO and PPO: what is drawn, what a step trains on, the same after a resume, reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case, merged
from tests.train.methods.cases_reinforcement import CASES, VOWELS, prompts, reinforcement
from tests.train.worker.runs import FULL, Work, build_engine_in, in_child
from tests.train.worker.test_preference_runs import same_weights

_BY_NAME = {case.name: case for case in CASES}
# name, changes, and the step that the run is taken up at. Steps 3 and 5 lie between those that share completions.
RESUMED: dict[str, tuple[str, dict[str, Any], int]] = {
    "GRPO": ("grpo-lora", {}, 3),
    "GRPO, within a set": ("grpo-full", {"objective": {"reinforcement": {"iterations": 2}}}, 3),
    "PPO, within a set": ("ppo-lora", {}, 3),
    "PPO, between sets": ("ppo-lora", {"tuning": FULL}, 2),
}


def _written(work: Work) -> str:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return str(work.root)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path: Path, name: str) -> None:
    case, changes, step = RESUMED[name]
    changes = merged(changes, {"hyperparameters": {"totalSteps": 6}, "checkpoint": {"everySteps": step}})
    whole = _BY_NAME[case].work(tmp_path / "whole", changes)
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, step, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    last = "checkpoints/step-6"
    assert [number for number, _, _ in resumed.losses(last)] == [1, 2, 3, 4, 5, 6]
    assert resumed.losses(last) == whole.losses(last)
    assert in_child(same_weights, str(whole.root), str(resumed.root))


def test_a_checkpoint_within_a_set_that_lacks_its_completions_is_refused(tmp_path: Path) -> None:
    changes = {"hyperparameters": {"totalSteps": 4}, "checkpoint": {"everySteps": 3}}
    whole = _BY_NAME["grpo-full"].work(tmp_path / "whole", changes)
    assert whole.train() == [0], whole.logged()
    assert (whole.root / "checkpoints/step-3/completions-0.safetensors").is_file()
    assert not (whole.root / "checkpoints/step-4/completions-0.safetensors").exists(), "a set is over"
    resumed = whole.resumed_from(whole, 3, tmp_path / "resumed")
    (resumed.root / "resume/completions-0.safetensors").unlink()
    assert resumed.train() == [87], resumed.logged()
    assert "it lacks completions-0.safetensors" in resumed.read("state/error-0.json")["message"]


def test_a_set_that_was_cut_into_other_micro_batches_is_drawn_anew(tmp_path: Path) -> None:
    """As after a lack of memory within a set: its batches would not fill the step, or fill it twice."""
    root = _written(_BY_NAME["grpo-full"].work(tmp_path / "w"))
    assert in_child(_batches_after_another_cut, root) == [2, 2, 2]


def _batches_after_another_cut(root: str) -> list[int]:
    """How many batches the second step of a set trains on, whose checkpoint holds one, two or three of them."""
    engine = build_engine_in(root)
    objective = engine.objective
    batches = [objective.collate([engine._records[k], engine._records[k + 1]]) for k in (0, 2)]
    window = objective.roll_out(engine, batches)
    engine.state.global_step = 1
    found = []
    for stored in ([window[0]], window, [*window, window[0]]):
        objective.window = stored
        found.append(len(objective.roll_out(engine, batches)))
    return found


def test_the_value_head_is_kept_in_checkpoints_and_not_exported(tmp_path: Path) -> None:
    work = _BY_NAME["ppo-lora"].work(tmp_path / "w", {"tuning": FULL, "hyperparameters": {"totalSteps": 2}})
    assert work.train() == [0], work.logged()
    published, kept, checkpointed = in_child(_value_weights, str(work.root))
    assert not [name for name in published + checkpointed if "value" in name]
    assert kept["weight"] > 0, "it started at zero and has learnt"


def _value_weights(root: str) -> tuple[list[str], dict[str, float], list[str]]:
    from safetensors.torch import load_file

    folder = Path(root)
    published = load_file(next((folder / "artifact/model").glob("*.safetensors")))
    kept = load_file(folder / "checkpoints/step-2/value_head.safetensors")
    model = load_file(folder / "checkpoints/step-2/model.safetensors")
    return sorted(published), {name: float(value.norm()) for name, value in kept.items()}, sorted(model)


def test_each_step_draws_anew_the_same_for_the_same_seed_and_leaves_the_global_state_alone(tmp_path: Path) -> None:
    root = _written(_BY_NAME["grpo-lora"].work(tmp_path / "w"))
    first, again, later, global_state_kept = in_child(_draws, root)
    assert first == again
    assert first != later
    assert global_state_kept


def _draws(root: str) -> tuple[Any, Any, Any, bool]:
    import torch

    engine = build_engine_in(root)
    batch = next(iter(engine.get_train_dataloader()))
    state = torch.random.get_rng_state()

    def drawn(step: int) -> Any:
        engine.state.global_step = step
        return engine.objective.roll_out(engine, [batch])[0]["input_ids"].tolist()

    first, later = drawn(0), drawn(1)
    torch.manual_seed(99)
    again = drawn(0)
    torch.random.set_rng_state(state)
    drawn(0)
    return first, again, later, bool(torch.equal(torch.random.get_rng_state(), state))


def test_completions_are_drawn_from_the_policys_own_distribution(tmp_path: Path) -> None:
    """Though the model's own generation settings ask for something else."""
    root = _written(_BY_NAME["grpo-lora"].work(tmp_path / "w"))
    shares, expected, tokens = in_child(_drawn_shares, root)
    assert tokens > 30, "not the one token that the model's own topK would leave"
    assert shares == pytest.approx(expected, abs=0.03)


def _drawn_shares(root: str) -> tuple[list[float], list[float], int]:
    import torch

    engine = build_engine_in(root)
    model, sampler = engine.model, engine.objective.sampler
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 2.0
    prompt = torch.tensor([0, 40, 41, 42])
    with torch.no_grad():
        expected = model(input_ids=prompt[None]).logits[0, -1].softmax(-1)
    # Padding on the left must not change what is drawn.
    ids = torch.cat([torch.zeros(3, dtype=torch.long), prompt]).repeat(2000, 1)
    mask = torch.cat([torch.zeros(3, dtype=torch.long), torch.ones(4, dtype=torch.long)]).repeat(2000, 1)
    first = torch.tensor([int(drawn.ids[0]) for drawn in sampler.draw(engine, ids, mask, 5)])
    best = expected.topk(5)
    shares = [float((first == token).float().mean()) for token in best.indices.tolist()]
    return shares, best.values.tolist(), len(first.unique())


@pytest.mark.parametrize("name", ["grpo-lora", "ppo-lora"])
def test_a_steps_loss_does_not_depend_on_how_its_completions_are_cut_into_batches(tmp_path: Path, name: str) -> None:
    root = _written(_BY_NAME[name].work(tmp_path / "w", {"objective": {"reinforcement": {"iterations": 2}}}))
    whole, parts, gradient, in_parts, ratio_moved = in_child(_split_losses, root)
    assert sum(parts) == pytest.approx(whole, rel=1e-5, abs=1e-5)
    assert in_parts == pytest.approx(gradient, rel=1e-4)
    assert ratio_moved, "the policy has moved since the completions were drawn"


def _split_losses(root: str) -> tuple[float, list[float], float, float, bool]:
    import torch

    engine = build_engine_in(root)
    objective = engine.objective
    batch = objective.roll_out(engine, [next(iter(engine.get_train_dataloader()))])[0]
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    for p in trained:
        p.data += 0.02 * torch.randn_like(p)

    def passed(rows: slice) -> float:
        loss = objective.loss_sum(engine.model, {name: value[rows] for name, value in batch.items()}).total
        loss.backward()
        return float(loss)

    def gradient() -> float:
        norm = float(sum((p.grad**2).sum() for p in trained if p.grad is not None)) ** 0.5
        engine.model.zero_grad()
        return norm

    whole = passed(slice(None))
    norm = gradient()
    rows = len(batch["real"])
    cuts = [slice(0, 1), slice(1, 3), slice(3, rows)]
    parts = [passed(cut) for cut in cuts]
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        from finetune_trainer.worker.objectives.policy import from_bits, token_log_probs

        now = token_log_probs(engine.model(**inputs).logits, batch["labels"])
    moved = float((now - from_bits(batch["old"])).abs().max()) > 1e-2
    return whole, parts, norm, gradient(), moved


def test_ppo_advantages_have_mean_0_and_variance_1_over_the_whole_set(tmp_path: Path) -> None:
    root = _written(_BY_NAME["ppo-lora"].work(tmp_path / "w", {"hyperparameters": {"microBatchSize": 4}}))
    mean, variance = in_child(_whitened, root)
    assert mean == pytest.approx(0.0, abs=1e-5)
    assert variance == pytest.approx(1.0, abs=1e-4)


def _whitened(root: str) -> tuple[float, float]:
    import torch

    from finetune_trainer.worker.objectives.policy import counted, from_bits

    engine = build_engine_in(root)
    batches = [batch for _, batch in zip(range(3), engine.get_train_dataloader(), strict=False)]
    window = engine.objective.roll_out(engine, batches)
    found = torch.cat([from_bits(b["advantage"])[counted(b["labels"])] for b in window]).double()
    return float(found.mean()), float(found.var(correction=0))


def test_two_ranks_train_on_completions_of_their_own(tmp_path: Path) -> None:
    changes = {"resources": {"processesPerNode": 2}, "hyperparameters": {"totalSteps": 3}}
    for name in ("grpo-full", "ppo-lora"):
        work = _BY_NAME[name].work(tmp_path / name, changes)
        assert work.train() == [0, 0], work.logged()
        history = [entry for entry in _history(work, 3) if "reward" in entry]
        assert history[0]["reward"] == history[1]["reward"], "two steps for each set"
        assert [entry["clippedShare"] > 0 for entry in history] == [False, True, False], "the ratio is 1 in a new set"
        files = [work.root / f"checkpoints/step-3/completions-{rank}.safetensors" for rank in (0, 1)]
        assert files[0].read_bytes() != files[1].read_bytes()


SHARDED = [
    pytest.param("ppo-lora", 3, id="PPO, ZeRO-3"),
    pytest.param("ppo-lora", 2, id="PPO, ZeRO-2", marks=pytest.mark.slow),
    pytest.param("grpo-lora", 3, id="GRPO, ZeRO-3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "stage"), SHARDED)
def test_ranks_that_shard_the_weights_draw_train_and_resume_to_the_bit(tmp_path: Path, name: str, stage: int) -> None:
    changes = {
        "hyperparameters": {"zeroStage": stage, "totalSteps": 4},
        "checkpoint": {"everySteps": 3},
        "resources": {"processesPerNode": 2},
    }
    whole = _BY_NAME[name].work(tmp_path / "whole", changes)
    assert whole.train() == [0, 0], whole.logged()
    resumed = whole.resumed_from(whole, 3, tmp_path / "resumed")
    assert resumed.train() == [0, 0], resumed.logged()
    last = "checkpoints/step-4"
    assert resumed.losses(last) == whole.losses(last)
    assert [step for step, _, _ in resumed.losses(last)] == [1, 2, 3, 4]
    rewards = [[entry["reward"] for entry in _history(work, 4) if "reward" in entry] for work in (whole, resumed)]
    assert rewards[0] == rewards[1]


def _history(work: Work, step: int) -> list[dict[str, Any]]:
    return work.read(f"checkpoints/step-{step}/trainer_state.json")["log_history"]


REWARD_MODEL = {"model": {"uri": "hf://tiny/reward", "access": {}}, "modelDigest": "sha256:r", "weight": 1.0}


def _with_reward_model(root: Path, **options: Any) -> Work:
    case = Case("grpo-model", {"spread": 0.2}, prompts(), reinforcement("GRPO", [VOWELS, REWARD_MODEL]))
    work = case.work(root)
    in_child(_make_reward_model, str(root / "inputs/rewards/1"), options)
    return work


def _make_reward_model(folder: str, options: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from tests.train.models import tiny_model, write_tokenizer

    Path(folder).mkdir(parents=True)
    base = tiny_model(spread=0.2, seed=3)
    if options.get("trained", True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder)
    write_tokenizer(Path(folder), chat_template=options.get("chat_template", False))
    if options.get("other_tokenizer"):
        path = Path(folder) / "tokenizer.json"
        document = json.loads(path.read_text())
        merges = document["model"]["merges"]
        document["model"]["merges"] = merges[:-3]
        path.write_text(json.dumps(document))


@pytest.mark.parametrize("other_tokenizer", [False, True])
def test_a_reward_model_scores_the_whole_text(tmp_path: Path, other_tokenizer: bool) -> None:
    work = _with_reward_model(tmp_path / "w", other_tokenizer=other_tokenizer)
    found, expected = in_child(_scores, _written(work))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len({round(score, 6) for score in found}) > 2


def _scores(root: str) -> tuple[list[float], list[float]]:
    """The reward model by itself on each text, plus 1 where the pattern is found."""
    import re

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    engine = build_engine_in(root)
    batch = next(iter(engine.get_train_dataloader()))
    answers = engine.objective.answers(batch, 3, 11)
    found = engine.objective.rewards.scores(answers)
    folder = Path(root) / "inputs/rewards/1"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for answer in answers:
        prompt = engine.objective.tokenizer.decode(answer.prompt, skip_special_tokens=True)
        text = engine.objective.tokenizer.decode(answer.drawn.ids, skip_special_tokens=True)
        ids = tokenizer(prompt + text)["input_ids"] + ([1] if answer.drawn.ended else [])
        same = tokenizer.backend_tokenizer.to_str() == engine.objective.tokenizer.backend_tokenizer.to_str()
        if same:  # what was drawn need not be what the text would be encoded as
            ids = [*answer.prompt.tolist(), *answer.drawn.ids.tolist()]
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        expected.append(score + float(re.search("([aeiou][^aeiou]*){2}", text) is not None))
    return found, expected


def test_a_reward_model_without_a_trained_output_is_refused(tmp_path: Path) -> None:
    work = _with_reward_model(tmp_path / "w", trained=False)
    codes = work.train()
    error = work.read("state/error-0.json")
    assert codes == [68], work.logged()
    assert error["class"] == "ModelUnsupported"
    assert error["field"] == "spec.objective.grpo.rewards[1].model"
