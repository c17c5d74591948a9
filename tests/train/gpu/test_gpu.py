"""What only a GPU can show. `make test-gpu` runs these and prints figures with the device's name.

Nothing here runs on the machines that build the project: there is no GPU. They are written so that a machine with one
needs nothing but `make test-gpu`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from tests.train.methods.case import Case, merged
from tests.train.methods.cases import CASES
from tests.train.methods.golden import read_golden
from tests.train.worker.runs import LORA, NF4, Work, in_child, run_document

pytestmark = pytest.mark.gpu

ON_GPU = {"resources": {"accelerator": "gpu"}}
# Kernels of a GPU add up in another order, and TF32 is off in FP32 runs.
BESIDE_CPU = 1e-2


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    """The device's name; fails where no GPU is usable, so that `make test-gpu` never passes for want of one."""
    name = in_child(_device)
    assert name, "no usable CUDA device"
    print(f"\ndevice: {name}")
    return str(name)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@pytest.mark.parametrize("case", [c for c in CASES if c.deterministic], ids=lambda case: case.name)
def test_the_golden_curve_of_the_cpu_holds_on_the_gpu(case: Case, tmp_path: Path) -> None:
    work = case.work(tmp_path / "run", ON_GPU)
    assert work.train() == [0] * work.run.world_size, work.logged()
    found = [line["loss"] for line in work.metrics() if "loss" in line]
    assert found == pytest.approx([loss for _, loss in read_golden(case.name)], rel=BESIDE_CPU)


def test_fp16_scales_its_loss_and_learns(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "supervised-lora")
    changes = merged(ON_GPU, {"hyperparameters": {"precision": "FP16", "totalSteps": 40}})
    work = case.work(tmp_path / "run", changes)
    assert work.train() == [0], work.logged()
    losses = [line["loss"] for line in work.metrics() if "loss" in line]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("attention", ["Eager", "Sdpa"])
def test_packed_documents_stay_apart_on_the_gpu(attention: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "supervised-packed")
    changes = merged(ON_GPU, {"model": {"attention": attention}, "hyperparameters": {"precision": "BF16"}})
    work = case.work(tmp_path / "run", changes)
    assert work.train() == [0], work.logged()
    assert not work.read("artifact/report.json")["data"]["packing"].startswith("off")


def test_qlora_of_a_model_of_7b_size(device: str, tmp_path: Path) -> None:
    """Random weights of Llama-2-7b's shape: NF4, rank 16 on every linear layer, 2,048 tokens, checkpointing."""
    model = tmp_path / "model"
    in_child(_seven_billion, str(model))
    rows = [{"text": " ".join(f"word{(k * 7 + j) % 97}" for j in range(900))} for k in range(32)]
    changes = {
        **ON_GPU,
        "dataset": {"format": "Text", "lossOn": "All", "truncation": "Tail", "validationFraction": None},
        "tuning": {"type": "QLoRA", "lora": {**LORA, "rank": 16, "alpha": 32}, "quantization": NF4},
        "hyperparameters": {
            "totalSteps": 12,
            "learningRate": 1e-4,
            "microBatchSize": 1,
            "gradientAccumulation": 2,
            "maxSequenceLength": 2048,
            "precision": "BF16",
            "optimizer": "PagedAdamW8bit",
            "gradientCheckpointing": True,
        },
    }
    work = Work.make(tmp_path / "run", RunFile.from_json(merged(run_document(), changes)), model, rows)
    shutil.rmtree(model)
    assert work.train() == [0], work.logged()
    training = work.read("artifact/report.json")["training"]
    print(
        f"{device}: 7B QLoRA, peak {training['peakGpuMemoryGiB']:.1f} GiB, "
        f"{training['tokens'] / training['seconds']:.0f} tokens/s"
    )
    assert 4 < training["peakGpuMemoryGiB"] < 24


def _seven_billion(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.train.models import write_tokenizer

    config: Any = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16", bos_token_id=0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    write_tokenizer(Path(folder))
    model.save_pretrained(folder, max_shard_size="4GB")
