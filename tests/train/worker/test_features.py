"""Training features: gradient clipping, NEFTune, seed, compilation, Liger, and what becomes of a wish in vain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.worker.runs import FULL, Work, build_engine_in, in_child, records, work_for


def featured(root: Path, **hyperparameters: Any) -> Work:
    """A short run of Full with these hyperparameters."""
    changes = {"tuning": {"type": "Full", "lora": None}, "hyperparameters": {"learningRate": 1e-3, **hyperparameters}}
    return Case("featured", {}, records(), changes).work(root)


def written(work: Work) -> Work:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


def test_gradients_are_clipped_to_exactly_the_norm_that_is_asked_for(tmp_path: Path) -> None:
    work = written(work_for(tmp_path / "w", **FULL, model={"spread": 0.2}))
    engine_norm, plain_norm, clipped = in_child(_clip, str(work.root), 0.25)
    assert plain_norm > 0.5, "there is something to clip"
    assert engine_norm == pytest.approx(plain_norm, rel=1e-5), "what is logged is the norm before clipping"
    assert clipped == pytest.approx(0.25, rel=1e-4)


def test_gradients_below_the_norm_are_left_alone(tmp_path: Path) -> None:
    work = written(work_for(tmp_path / "w", **FULL, model={"spread": 0.2}))
    _, plain_norm, clipped = in_child(_clip, str(work.root), 1e6)
    assert clipped == pytest.approx(plain_norm, rel=1e-6)


def _clip(root: str, limit: float) -> tuple[float, float, float]:
    """(what the engine logs, the norm by plain torch, the norm after clipping) of one step's gradient."""
    import torch

    engine = build_engine_in(root)
    engine.args.max_grad_norm = limit
    engine.create_optimizer_and_scheduler(1)
    engine.model, engine.optimizer = engine.accelerator.prepare(engine.model, engine.optimizer)
    engine.model.train()
    batch = next(iter(engine.get_train_dataloader()))
    units = engine.objective.units(batch).double()
    (engine.objective.loss_sum(engine.model, batch).total / units).backward()
    gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
    plain = torch.cat([g.flatten().double() for g in gradients]).norm().item()
    logged = float(engine._clip_grad_norm(engine.model))
    return logged, plain, torch.cat([g.flatten().double() for g in gradients]).norm().item()


def test_neftune_adds_noise_of_the_papers_size_in_training_only(tmp_path: Path) -> None:
    """NEFTune (Jain et al. 2023): uniform within alpha / sqrt(length x width)."""
    work = written(featured(tmp_path / "w", neftuneAlpha=5.0))
    largest, bound, in_evaluation = in_child(_neftune, str(work.root))
    assert 0.9 * bound < largest <= bound
    assert in_evaluation == 0.0


def _neftune(root: str) -> tuple[float, float, float]:
    """(largest noise, its bound, largest noise in evaluation) of a batch of one length."""
    import torch
    from transformers.integrations.neftune import activate_neftune

    engine = build_engine_in(root)
    ids = torch.arange(3, 35)[None].repeat(8, 1)
    layer = engine.model.get_input_embeddings()
    activate_neftune(engine.model, engine.args.neftune_noise_alpha, engine.accelerator)
    plain = layer.weight[ids]
    engine.model.train()
    noise = (layer(ids) - plain).abs().max().item()
    engine.model.eval()
    return noise, 5.0 / (32 * plain.shape[-1]) ** 0.5, (layer(ids) - plain).abs().max().item()


def test_neftune_changes_training_and_not_what_is_published(tmp_path: Path) -> None:
    runs = {alpha: featured(tmp_path / str(alpha), neftuneAlpha=alpha) for alpha in (None, 10.0)}
    for work in runs.values():
        assert work.train() == [0], work.logged()
    plain, noisy = ([line for line in work.metrics() if "loss" in line] for work in runs.values())
    assert plain[0]["loss"] != noisy[0]["loss"]
    base = [work.read("artifact/report.json")["evaluation"]["base"] for work in runs.values()]
    assert base[0] == base[1], "evaluation is without noise"
    assert runs[10.0].read("artifact/report.json")["hyperparameters"]["neftuneAlpha"] == 10.0


def test_the_seed_alone_decides_the_curve(tmp_path: Path) -> None:
    works = {name: work_for(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    losses = {}
    for name, work in works.items():
        assert work.train() == [0], work.logged()
        losses[name] = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def test_liger_on_a_cpu_is_off_with_the_reason(tmp_path: Path) -> None:
    work = featured(tmp_path / "w", liger=True, totalSteps=1)
    assert work.train() == [0], work.logged()
    features = work.read("artifact/report.json")["features"]
    assert features == {
        "compile": False,
        "liger": False,
        "off": {"hyperparameters.liger": "Liger kernels run on GPUs only"},
    }
    assert "Off: hyperparameters.liger" in (work.root / "artifact/report.md").read_text()
    events = [json.loads(line) for line in work.logged().splitlines() if '"feature-off"' in line]
    assert [event["field"] for event in events] == ["hyperparameters.liger"]


def test_compilation_without_a_compiler_is_off_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.worker.features import Features

    run = featured(tmp_path / "w", compile=True).run
    monkeypatch.setenv("CXX", "no-such-compiler")
    features = Features.of(run)
    assert features.compile is False
    assert "no no-such-compiler" in features.off["hyperparameters.compile"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler on this machine")
def test_a_compiled_run_gives_the_losses_of_a_plain_one(tmp_path: Path) -> None:
    losses = []
    for name, compiled in (("plain", False), ("compiled", True)):
        work = featured(tmp_path / name, compile=compiled)
        assert work.train() == [0], work.logged()
        assert work.read("artifact/report.json")["features"]["compile"] is compiled
        losses.append([line["loss"] for line in work.metrics() if "loss" in line])
        assert (work.root / "artifact/model/model.safetensors").is_file()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
def test_fp16_scales_its_loss_and_learns(tmp_path: Path) -> None:
    """On a GPU: the dynamic loss scaler of FP16 skips steps that overflow and goes on; masters stay fp32."""
    changes = {
        "hyperparameters": {"totalSteps": 40, "precision": "FP16", "learningRate": 3e-3, "microBatchSize": 4},
        "resources": {"accelerator": "gpu"},
        "tuning": {"type": "Full", "lora": None},
    }
    work = Case("fp16", {"spread": 0.2, "width": 64}, records(), changes).work(tmp_path / "w")
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert work.read("artifact/report.json")["evaluation"]["tuned"]["loss"] < losses[0] / 2
