"""What ends a run early: a stop, a figure that is not finite, input that cannot be used. Nothing bad is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import FULL, LORA, QLORA, Work, build_engine_in, in_child, run_file, work_for


def test_a_stop_leads_to_a_checkpoint_and_exit_100_on_all_ranks(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", totalSteps=5000, processesPerNode=2)
    processes = work.start()
    work.wait_for_step(2)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)  # ignored: the agent asks by the file
    (work.root / "control/stop").touch()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [100, 100], work.logged()
    assert work.read("state/error-0.json")["class"] == "Stopped"
    ready = list((work.root / "checkpoints").glob("*.ready"))
    assert len(ready) == 1
    step = json.loads(ready[0].read_text())["step"]
    assert 2 <= step < 5000
    names = {path.name for path in (work.root / f"checkpoints/step-{step}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= names
    assert not (work.root / "artifact.ready").exists()


def test_minutes_and_steps_both_lead_to_checkpoints(tmp_path: Path) -> None:
    by_minutes = work_for(tmp_path / "minutes", saveMinutes=1e-9)
    assert by_minutes.train() == [0], by_minutes.logged()
    written = _ready(by_minutes)
    assert {1, 4} <= set(written), "the first save and the last one are never left out"
    skipped = by_minutes.read("checkpoints/step-4.ready")["skipped"]
    assert len(written) + skipped == 4, "the time is up at each step"
    by_steps = work_for(tmp_path / "steps", saveSteps=3)
    assert by_steps.train() == [0], by_steps.logged()
    assert _ready(by_steps) == [3, 4], "each third step, and the last"


def _ready(work: Work) -> list[int]:
    return sorted(json.loads(p.read_text())["step"] for p in (work.root / "checkpoints").glob("*.ready"))


def test_a_non_finite_loss_ends_the_run_within_the_step(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", learningRate=1e30, schedule="Constant", saveSteps=1, totalSteps=8)
    assert work.train() == [83], work.logged()
    error = work.read("state/error-0.json")
    assert error["class"] == "NonFiniteLoss"
    assert error["field"] == "spec.hyperparameters.learningRate"
    last = max(_ready(work))
    assert f"step {last + 1} is not finite" in error["message"], "caught in the very step after the last good one"
    assert all(in_child(_all_finite, str(work.root / f"checkpoints/step-{step}")) for step in _ready(work))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", **FULL)
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    error = in_child(_save_broken_weights, str(work.root))
    assert error == (
        "NonFiniteLoss",
        "The weight model.norm.weight is not finite; the checkpoint was not written. "
        "Lower hyperparameters.learningRate.",
    )
    assert _ready(work) == []
    assert not list((work.root / "checkpoints").glob("step-*"))


def _save_broken_weights(root: str) -> tuple[str, str]:
    from finetune_api.failures import FinetuneError

    engine = build_engine_in(root)
    engine.model.model.norm.weight.data[3] = float("inf")
    try:
        engine._save_checkpoint(engine.model)
    except FinetuneError as error:
        return error.failure_class, str(error)
    return "", "saved"


def test_all_ranks_end_together_when_one_sees_a_non_finite_loss(tmp_path: Path) -> None:
    rows = [{"prompt": "p ", "completion": "ok"} for _ in range(7)] + [{"prompt": "p ", "completion": "Z"}]
    work = work_for(
        tmp_path / "w",
        rows=rows,
        validationFraction=None,
        processesPerNode=2,
        microBatchSize=1,
        gradientAccumulation=1,
        totalSteps=8,
        saveSteps=1,
    )
    in_child(_break_token, str(work.root / "inputs/model"), "Z")
    assert work.train() == [83, 83], work.logged()
    assert all(in_child(_all_finite, str(work.root / f"checkpoints/step-{step}")) for step in _ready(work))


def _break_token(folder: str, text: str) -> None:
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    token = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids[0]
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


def _all_finite(folder: str) -> bool:
    from safetensors.torch import load_file

    files = list(Path(folder).glob("*.safetensors"))
    assert files
    return all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("changes", "message", "field"),
    [
        ({"lora": {**LORA, "targetModules": ["lm_head"]}}, "shares its weights", "spec.tuning.lora.targetModules"),
        ({"lora": {**LORA, "targetModules": ["q_prog"]}}, "q_proj", "spec.tuning.lora.targetModules"),
        ({**QLORA, "zeroStage": 3}, "zeroStage 3 cannot shard quantised", "spec.hyperparameters.zeroStage"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(
    tmp_path: Path, changes: dict[str, Any], message: str, field: str
) -> None:
    work = work_for(tmp_path / "w", model={"tied": True}, **changes)
    assert work.train() == [64], work.logged()
    error = work.read("state/error-0.json")
    assert error["class"] == "InvalidSpec"
    assert message in error["message"]
    assert error["field"] == field


def test_a_model_with_pickle_weights_only_is_unsafe(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w")
    (work.root / "inputs/model/model.safetensors").rename(work.root / "inputs/model/pytorch_model.bin")
    assert work.train() == [89], work.logged()
    assert "pytorch_model.bin" in work.read("state/error-0.json")["message"]


def test_a_model_that_lacks_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w")
    in_child(_drop_weight, str(work.root / "inputs/model/model.safetensors"), "model.norm.weight")
    assert work.train() == [68], work.logged()
    error = work.read("state/error-0.json")
    assert error["class"] == "ModelUnsupported"
    assert "model.norm.weight" in error["message"]


def _drop_weight(file: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def test_a_run_for_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w")
    document = work.run.to_json()
    document["resources"]["accelerator"] = "a100-80"
    work = Work(work.root, type(work.run).from_json(document))
    assert work.train() == [90], work.logged()
    assert work.read("state/error-0.json")["class"] == "AcceleratorMismatch"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("gpu", "OutOfGpuMemory"),
        ("host", "OutOfHostMemory"),
        ("disk", "DiskFull"),
        ("peer", "CollectiveFailed"),
        ("pickle", "UnsafeFile"),
        ("other", "Internal"),
    ],
)
def test_an_exception_becomes_the_class_that_the_table_knows(error: str, expected: str) -> None:
    assert in_child(_classify, error) == expected


def _classify(kind: str) -> str:
    import errno
    import pickle

    import torch

    from finetune_api.failures import TABLE
    from finetune_trainer.worker.faults import classify

    errors: dict[str, Exception] = {
        "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "peer": RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"),
        "pickle": pickle.UnpicklingError("Weights only load failed."),
        "other": KeyError("x"),
    }
    fault = classify(errors[kind])
    assert TABLE[fault.failure_class].exit_code is not None
    return fault.failure_class


def test_the_run_file_of_these_tests_is_valid() -> None:
    assert run_file(processesPerNode=2).global_batch_size == 8
