"""Runs of DPO, ORPO and KTO: exact under any split, the same after a resume, refused where nothing can be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_preference import CASES, preference
from tests.train.worker.gradients import flat_gradient
from tests.train.worker.runs import FULL, Work, build_engine_in, in_child, launch

SPLITS = [(8, 1, 1), (1, 8, 1), (3, 3, 1), (2, 2, 2)]
TOLERANCE = 2e-6
_BY_NAME = {case.name: case for case in CASES}


def _rows(kind: str) -> list[dict[str, Any]]:
    """Eight records of distinct lengths: the order of a step's records is then the same in every epoch."""
    texts = [(f"say{' x' * 2 * k}:", f" RED{' red' * (k % 3)}", f" blue{' b' * (k % 4)}") for k in range(8)]
    if kind == "KTO":
        return [
            {"prompt": p, "completion": c if k % 2 else r, "label": bool(k % 2)} for k, (p, c, r) in enumerate(texts)
        ]
    return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]


def _work(kind: str, root: Path, micro: int, accumulation: int, ranks: int) -> Work:
    changes = {
        "tuning": FULL,
        "dataset": {"format": "Preference", "validationFraction": None},
        "hyperparameters": {
            "microBatchSize": micro,
            "gradientAccumulation": accumulation,
            "totalSteps": 2,
            "maxGradNorm": 1000.0,
            "schedule": "Constant",
        },
        "resources": {"processesPerNode": ranks},
    }
    settings = {"KTO": {"desirableWeight": 1.2, "undesirableWeight": 0.8}, "DPO": {"labelSmoothing": 0.1}}
    case = Case(kind, {"spread": 0.2}, _rows(kind), {**preference(kind, **settings.get(kind, {})), **changes})
    return case.work(root)


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), SPLITS)
@pytest.mark.parametrize("kind", ["DPO", "ORPO", "KTO"])
def test_a_step_has_the_gradient_of_the_papers_formula_over_all_its_records(
    tmp_path: Path, kind: str, micro: int, accumulation: int, ranks: int
) -> None:
    """The second step, in which the policy is no longer its reference."""
    work = _work(kind, tmp_path / "w", micro, accumulation, ranks)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    assert launch(_save_second_gradient, ranks, str(work.root)) == [0] * ranks
    reference, moved = in_child(_formula_gradient, str(work.root), kind)
    found = np.load(work.root / "gradient-0.npy")
    assert moved > 1e-2, "the policy has left its reference"
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) <= TOLERANCE


def _save_second_gradient(root: str, env: dict[str, str]) -> int:
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    engine = build_engine_in(root)

    class Save(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
                save_file(weights, f"{root}/weights-{env['RANK']}.safetensors")
                np.save(f"{root}/gradient-{env['RANK']}.npy", flat_gradient(engine.model))

    engine.add_callback(Save())
    engine.train()
    return 0


def _formula_gradient(root: str, kind: str) -> tuple[Any, float]:
    """By plain torch, one text at a time: the gradient at the saved weights, and how far they are from the base's."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_api.runfile import RunFile
    from finetune_trainer.data import load_dataset

    folder = Path(root)
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    items = list(load_dataset(run, folder / "inputs", AutoTokenizer.from_pretrained(folder / "inputs/model")).train)
    assert len(items) == 8
    base, policy = (AutoModelForCausalLM.from_pretrained(folder / "inputs/model") for _ in range(2))
    policy.load_state_dict(load_file(folder / "weights-0.safetensors"), strict=False)
    moved = max(float((p - q).detach().norm()) for p, q in zip(policy.parameters(), base.parameters(), strict=True))

    def log_prob(model: Any, ids: Any, labels: Any) -> tuple[Any, int]:
        tokens, wanted = (torch.from_numpy(np.asarray(a, np.int64)) for a in (ids, labels))
        logs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        kept = wanted[1:] != -100
        return logs[kept, wanted[1:][kept]].sum(), int(kept.sum())

    def ratio(ids: Any, labels: Any) -> Any:
        with torch.no_grad():
            before = log_prob(base, ids, labels)[0]
        return log_prob(policy, ids, labels)[0] - before

    beta, total = 0.1, torch.zeros(())
    if kind == "KTO":
        order = sorted(items, key=lambda item: -len(item.input_ids))
        shifted = zip(order, [*order[1:], order[0]], strict=True)
        with torch.no_grad():
            mean = sum(
                ratio([*a.input_ids[: a.prompt], *b.input_ids[b.prompt :]], [*[-100] * a.prompt, *b.labels[b.prompt :]])
                for a, b in shifted
            ) / len(items)
        divergence = max(float(mean), 0.0)
        for item in items:
            sign, weight = (1, 1.2) if item.desirable else (-1, 0.8)
            own = ratio(item.input_ids, item.labels)
            total = total + weight * (1 - torch.sigmoid(beta * sign * (own - divergence)))
    for item in items if kind != "KTO" else []:
        if kind == "DPO":
            margin = beta * (
                ratio(item.chosen_ids, item.chosen_labels) - ratio(item.rejected_ids, item.rejected_labels)
            )
            total = total - 0.9 * torch.sigmoid(margin).log() - 0.1 * torch.sigmoid(-margin).log()
        else:
            (chosen, m), (rejected, n) = (
                log_prob(policy, item.chosen_ids, item.chosen_labels),
                log_prob(policy, item.rejected_ids, item.rejected_labels),
            )
            odds = [(mean.exp() / (1 - mean.exp())).log() for mean in (chosen / m, rejected / n)]
            total = total - chosen / m - beta * torch.sigmoid(odds[0] - odds[1]).log()
    (total / len(items)).backward()
    return flat_gradient(policy), moved


@pytest.mark.parametrize("name", ["dpo-lora", "dpo-full", "kto-lora"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path: Path, name: str) -> None:
    """With Full the reference is still the base, not the checkpoint."""
    changes = {"hyperparameters": {"totalSteps": 6}, "checkpoint": {"everySteps": 3}}
    whole = _BY_NAME[name].work(tmp_path / "whole", changes)
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 3, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    last = "checkpoints/step-6"
    assert [step for step, _, _ in resumed.losses(last)] == [1, 2, 3, 4, 5, 6]
    assert resumed.losses(last) == whole.losses(last)
    assert in_child(same_weights, str(whole.root), str(resumed.root))


def same_weights(first: str, second: str) -> bool:
    """In a child: whether both runs published the same weights, bit by bit."""
    import torch
    from safetensors.torch import load_file

    found = [load_file(next((Path(root) / "artifact").glob("*/*.safetensors"))) for root in (first, second)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_is_the_start_whatever_is_trained(tmp_path: Path, autocast: bool) -> None:
    work = _BY_NAME["dpo-lora"].work(tmp_path / "w", {"tuning": {"lora": {"dropout": 0.3}}})
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    before, within, after, training, dropouts = in_child(_through_a_change, str(work.root), autocast)
    assert within == before
    assert after != before
    assert training is True, "the policy goes on training as it was"
    assert dropouts == {0.0}, "the ratio of policy and reference would measure its noise"


def _through_a_change(root: str, autocast: bool) -> tuple[list[float], list[float], list[float], bool, set[float]]:
    import torch

    engine = build_engine_in(root)
    ids = torch.arange(10)[None]

    def logits() -> list[float]:
        with torch.no_grad():
            return engine.model(input_ids=ids).logits.flatten().tolist()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = logits()
    for p in engine.model.parameters():
        if p.requires_grad:
            p.data += 0.1
    engine.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        after = logits()
        with engine.objective.reference.in_force():
            within = logits()
        assert logits() == after, "the policy is back"
    dropouts = {module.p for module in engine.model.modules() if isinstance(module, torch.nn.Dropout)}
    return before, within, after, engine.model.training, dropouts


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Though the weights are the reference's for a while between the passes forward and backward."""
    losses = []
    for on in (False, True):
        work = _BY_NAME["dpo-full"].work(tmp_path / str(on), {"hyperparameters": {"gradientCheckpointing": on}})
        assert work.train() == [0], work.logged()
        losses.append([line[name] for line in work.metrics() if "loss" in line for name in ("loss", "gradNorm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 2 * 4


def test_kto_is_refused_for_steps_of_one_record(tmp_path: Path) -> None:
    changes = {"hyperparameters": {"microBatchSize": 1, "gradientAccumulation": 1}}
    work = _BY_NAME["kto-lora"].work(tmp_path / "w", changes)
    assert work.train() == [64], work.logged()
    error = work.read("state/error-0.json")
    assert error["class"] == "InvalidSpec"
    assert error["field"] == "spec.hyperparameters.globalBatchSize"


def test_a_full_copy_of_sharded_weights_is_refused(tmp_path: Path) -> None:
    changes = {"hyperparameters": {"zeroStage": 3}}
    work = _BY_NAME["dpo-full"].work(tmp_path / "w", changes)
    assert work.train() == [64], work.logged()
    assert work.read("state/error-0.json")["field"] == "spec.hyperparameters.zeroStage"


@pytest.mark.parametrize("stage", [2, 3])
def test_dpo_with_an_adapter_under_zero_has_the_losses_of_one_process(tmp_path: Path, stage: int) -> None:
    case = _BY_NAME["dpo-lora"]
    one = case.work(tmp_path / "one", {"hyperparameters": {"totalSteps": 3}})
    changes = {
        "hyperparameters": {"totalSteps": 3, "zeroStage": stage, "microBatchSize": 2},
        "resources": {"processesPerNode": 2},
    }
    two = case.work(tmp_path / "two", changes)
    assert one.train() == [0], one.logged()
    assert two.train() == [0, 0], two.logged()
    expected = [line["loss"] for line in one.metrics() if "loss" in line]
    assert [line["loss"] for line in two.metrics() if "loss" in line] == pytest.approx(expected, rel=1e-4)
    assert expected[2] != pytest.approx(expected[0], rel=1e-2)
