"""Supervised fine-tuning beside TRL's SFTTrainer: the same tokens, the same loss, the same gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import merged
from tests.train.worker.runs import Work, build_engine_in, in_child, made_model, records, run_document

TEMPLATE = {"promptTemplate": "{prompt}{completion}", "validationFraction": None}


def test_tokens_loss_and_gradient_equal_those_of_trl(tmp_path: Path) -> None:
    """One step of eight records with unequal lengths, loss on the completion, full tuning in FP32."""
    rows = records()[:8]
    ours, theirs = _both(tmp_path, rows)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["counted"] == theirs["counted"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["distance"] < 1e-5


def _both(root: Path, rows: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    from finetune_api.runfile import RunFile

    changes = {
        "dataset": TEMPLATE,
        "tuning": {"type": "Full", "lora": None},
        "hyperparameters": {"microBatchSize": 8, "gradientAccumulation": 1},
    }
    work = Work.make(root / "run", RunFile.from_json(merged(run_document(), changes)), made_model(), rows)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return in_child(_compare, str(work.root), rows)


def _compare(root: str, rows: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    engine = build_engine_in(root)
    batch = engine.objective.collate(list(engine.train_dataset))
    engine.model.train()
    units = engine.objective.units(batch)
    loss = engine.objective.loss_sum(engine.model, batch).total / units
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in engine.model.parameters()])
    theirs, their_gradient = _trl(f"{root}/inputs/model", rows, f"{root}/trl")
    ours = {
        "tokens": sorted(e.input_ids.tolist() for e in engine.train_dataset),
        "counted": int(units),
        "loss": float(loss.detach()),
        "distance": float((gradient - their_gradient).norm() / their_gradient.norm()),
    }
    return ours, theirs


def _trl(model: str, rows: list[dict[str, str]], folder: str) -> tuple[dict[str, Any], Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=64,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    counted = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counted)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    tokens = sorted(list(row["input_ids"]) for row in trainer.train_dataset)
    return {"tokens": tokens, "counted": int(counted), "loss": float(loss.detach())}, gradient
