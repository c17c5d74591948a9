"""DeepSpeed ZeRO: its settings, the recipe that also works on CPU, and the proof that it is in force."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.job import Optimizer, Precision
from finetune_api.runfile import RunFile
from finetune_trainer.worker.ranks import Ranks


def check_zero(run: RunFile) -> None:
    """Refuse the combinations that do not work; raises InvalidSpec with the field."""
    hp = run.hyperparameters
    if hp.zero_stage == 0:
        return
    if run.tuning.quantization is not None and hp.zero_stage == 3:
        raise FinetuneError(
            "zeroStage 3 cannot shard quantised weights; use zeroStage 2 or less with tuning.quantization.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.zeroStage",
        )
    if hp.optimizer is not Optimizer.ADAMW:
        raise FinetuneError(
            f"Optimizer {hp.optimizer} does not work with zeroStage {hp.zero_stage}; use AdamW.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.optimizer",
        )
    if hp.precision is Precision.FP16 and run.resources.accelerator == "cpu":
        raise FinetuneError(
            "precision FP16 with ZeRO needs a GPU; use BF16 or FP32 on a cpu pool.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.precision",
        )


def zero_config(run: RunFile, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: nothing in it is left to be guessed.

    In 16-bit runs DeepSpeed keeps the fp32 master weights of what trains in its optimizer shards.
    """
    hp = run.hyperparameters
    zero: dict[str, Any] = {"stage": hp.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if hp.zero_stage == 3:
        # Only publishing gathers the weights; see export.gathered_state.
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    return {
        "train_batch_size": hp.micro_batch_size * hp.gradient_accumulation * world_size,
        "train_micro_batch_size_per_gpu": hp.micro_batch_size,
        "gradient_accumulation_steps": hp.gradient_accumulation,
        "gradient_clipping": hp.max_grad_norm,
        "bf16": {"enabled": hp.precision is Precision.BF16},
        "fp16": {"enabled": hp.precision is Precision.FP16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def prepare_zero(run: RunFile, ranks: Ranks) -> dict[str, Any]:
    """Start the process group for DeepSpeed; returns what TrainingArguments needs to take it up.

    Call it before TrainingArguments are made. On CPU use_cpu alone drops DeepSpeed without a word and runs plain
    data parallelism, so the state is configured here and TrainingArguments are told to keep it; create_scheduler
    proves that it worked.
    """
    os.environ.update(
        {
            "RANK": str(ranks.rank),
            "LOCAL_RANK": str(ranks.local_rank),
            "WORLD_SIZE": str(ranks.world_size),
            "ACCELERATE_USE_DEEPSPEED": "true",
        }
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29400")
    on_cpu = run.resources.accelerator == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _use_gloo_alone()
    from accelerate import PartialState

    PartialState(backend="gloo" if on_cpu else "nccl")
    return {
        "deepspeed": zero_config(run, ranks.world_size),
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": on_cpu,
    }


def _use_gloo_alone() -> None:
    """DeepSpeed would compile a shared-memory kernel at start: a minute, a compiler, a writable home."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def leave_out_deepspeed() -> None:
    """Without ZeRO, keep accelerate from importing DeepSpeed to look for its engine: 1.5 s and 100 MB at each start."""
    from accelerate.utils import other

    other.is_deepspeed_available = lambda: False


def assert_zero(model: Any, stage: int) -> None:
    """Raises Internal unless model is a DeepSpeed engine at stage."""
    from deepspeed import DeepSpeedEngine

    found = model.zero_optimization_stage() if isinstance(model, DeepSpeedEngine) else type(model).__name__
    if found != stage:
        raise FinetuneError(f"DeepSpeed ZeRO stage {stage} was planned, but the engine is {found}.")


@contextmanager
def unsharded() -> Iterator[None]:
    """Models that are made or loaded inside are whole on each rank, also under ZeRO-3."""
    from transformers.integrations import deepspeed

    found = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = found
