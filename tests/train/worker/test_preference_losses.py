"""The losses of DPO, ORPO and KTO against the papers' formulas in plain torch, and against TRL."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_preference import preference
from tests.train.worker.runs import FULL, in_child, made_model

CLOSE = 1e-5
_MODEL = {"spread": 0.2}
# Prompts and completions of distinct lengths; no token reaches over the boundary, so that TRL reads the same ones.
_TEXTS = [(f"say{' very' * k} loud:", f" RED{' RED' * k}", f" DER{' DER' * k}") for k in range(8)]


def test_dpo_is_the_papers_formula() -> None:
    found, expected = in_child(_dpo)
    assert found == pytest.approx(expected, abs=CLOSE)


def _dpo() -> tuple[list[float], list[float]]:
    import torch

    from finetune_trainer.worker.objectives.preference import dpo_losses

    torch.manual_seed(0)
    policy, reference = torch.randn(2, 16) * 20, torch.randn(2, 16) * 20
    found, expected = [], []
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2)):
        losses, margins = dpo_losses(policy, reference, beta, smoothing)
        found += [*losses.tolist(), *margins.tolist()]
        margin = [
            beta * ((pc - rc) - (pr - rr)) for pc, pr, rc, rr in zip(*policy.tolist(), *reference.tolist(), strict=True)
        ]
        expected += [(1 - smoothing) * _softplus(-m) + smoothing * _softplus(m) for m in margin] + margin
    return found, expected


def _softplus(value: float) -> float:
    return math.log1p(math.exp(value)) if value < 30 else value


def test_orpo_is_the_papers_formula_and_trls_odds_ratio() -> None:
    found, expected, trl, gradient = in_child(_orpo)
    assert found == pytest.approx(expected, rel=CLOSE)
    assert found == pytest.approx(trl, rel=CLOSE)
    assert all(map(math.isfinite, gradient)), "also for a text of probability 1"


def _orpo() -> tuple[list[float], list[float], list[float], list[float]]:
    from types import SimpleNamespace

    import torch
    from trl.experimental.orpo import ORPOTrainer

    from finetune_trainer.worker.objectives.preference import orpo_losses

    torch.manual_seed(0)
    means = -torch.rand(2, 16) * 8 - 1e-3
    weight = 0.3
    found = orpo_losses(means, weight).tolist()

    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    pairs = list(zip(*means.tolist(), strict=True))
    expected = [-c - weight * math.log(1 / (1 + math.exp(-math.log(odds(c) / odds(r))))) for c, r in pairs]
    trainer = SimpleNamespace(beta=weight, accelerator=SimpleNamespace(device="cpu"))
    ratios = ORPOTrainer.odds_ratio_loss(trainer, means[0], means[1])[0]
    trl = (-means[0] - ratios).tolist()

    edge = torch.tensor([[0.0, -1e-9, -50.0], [-50.0, 0.0, -1e-9]], requires_grad=True)
    orpo_losses(edge, weight).sum().backward()
    assert edge.grad is not None
    return found, expected, trl, edge.grad.flatten().tolist()


def test_kto_is_the_papers_formula() -> None:
    found, expected = in_child(_kto)
    assert found == pytest.approx(expected, abs=CLOSE)


def _kto() -> tuple[list[float], list[float]]:
    import torch

    from finetune_api.runfile import RunPreference
    from finetune_trainer.worker.objectives.kto import kto_losses

    torch.manual_seed(0)
    ratios, desirable = torch.randn(16) * 10, torch.arange(16) % 2
    settings = RunPreference(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    divergence = 1.7

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    expected = [
        1.3 * (1 - sigmoid(0.2 * (r - divergence))) if good else 0.7 * (1 - sigmoid(0.2 * (divergence - r)))
        for r, good in zip(ratios.tolist(), desirable.tolist(), strict=True)
    ]
    return kto_losses(ratios, desirable, torch.tensor(divergence), settings).tolist(), expected


def _case(kind: str, rows: list[dict[str, Any]], **settings: Any) -> Case:
    hyper = {
        "microBatchSize": len(rows),
        "gradientAccumulation": 1,
        "totalSteps": 3,
        "schedule": "Constant",
        "learningRate": 1e-3,
        "maxSequenceLength": 128,
    }
    changes = preference(kind, **settings)
    return Case(
        kind,
        _MODEL,
        rows,
        {
            **changes,
            "dataset": {**changes["dataset"], "promptTemplate": _template(kind), "validationFraction": None},
            "tuning": FULL,
            "hyperparameters": hyper,
        },
    )


def _template(kind: str) -> str:
    return "{prompt}{completion}" if kind == "KTO" else "{prompt}{chosen}"


def _losses(case: Case, root: Path) -> list[float]:
    work = case.work(root)
    assert work.train() == [0], work.logged()
    return [line["loss"] for line in work.metrics() if "loss" in line]


def test_three_steps_of_dpo_have_trls_losses(tmp_path: Path) -> None:
    # Without label smoothing: TRL 1.16 takes the setting and leaves it out of the loss "sigmoid".
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in _TEXTS]
    ours = _losses(_case("DPO", rows), tmp_path / "run")
    theirs = in_child(_trl_dpo, str(made_model(**_MODEL)), rows)
    assert ours == pytest.approx(theirs, rel=CLOSE)
    assert ours[2] < ours[0] - 1e-3


def _trl_options() -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(_TEXTS),
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "weight_decay": 0.0,
        "beta": 0.1,
    }


def _trl_dpo(model: str, rows: list[dict[str, str]]) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(**_trl_options(), loss_type=["sigmoid"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_three_steps_of_kto_have_trls_losses(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c if k % 3 else r, "label": bool(k % 3)} for k, (p, c, r) in enumerate(_TEXTS)]
    ours = _losses(_case("KTO", rows, desirableWeight=1.2), tmp_path / "run")
    theirs, order = in_child(_trl_kto, str(made_model(**_MODEL)), rows)
    assert order == sorted(order), "TRL pairs each prompt with the completion before it, ours with the next shorter one"
    assert ours == pytest.approx(theirs, rel=CLOSE)
    assert ours[2] < ours[0] - 1e-3


def _trl_kto(model: str, rows: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=KTOConfig(**_trl_options(), desirable_weight=1.2, undesirable_weight=1.0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
