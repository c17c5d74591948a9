"""From the run file to TrainingArguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from finetune_api.failures import FinetuneError
from finetune_api.job import Optimizer, Precision, Schedule
from finetune_api.runfile import RunFile
from finetune_trainer.worker.features import Features
from finetune_trainer.worker.ranks import Ranks
from finetune_trainer.worker.zero import leave_out_deepspeed, prepare_zero

OPTIMIZERS = {
    Optimizer.ADAMW: "adamw_torch",
    Optimizer.ADAMW_8BIT: "adamw_8bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
    Optimizer.ADAFACTOR: "adafactor",
    Optimizer.LION: "lion_32bit",
    Optimizer.LION_8BIT: "lion_8bit",
    Optimizer.PAGED_LION_8BIT: "paged_lion_8bit",
}
SCHEDULES: dict[Schedule, tuple[str, dict[str, float]]] = {
    Schedule.CONSTANT: ("constant_with_warmup", {}),
    Schedule.LINEAR: ("linear", {}),
    Schedule.COSINE: ("cosine", {}),
    Schedule.COSINE_TO_TENTH: ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    # The square of the remaining share of the steps.
    Schedule.POLYNOMIAL: ("polynomial", {"power": 2.0, "lr_end": 0.0}),
    # sqrt(warm-up steps / step) after the warm-up; without one the library takes 10,000 steps in its place.
    Schedule.INVERSE_SQRT: ("inverse_sqrt", {}),
}
# Loading and evaluation differ between ranks by minutes at most; a lost rank is ended by the agent, not by this.
_COLLECTIVE_SECONDS = 1800


def training_arguments(run: RunFile, ranks: Ranks, folder: Path, *, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of the run; starts the process group where there is one. folder: scratch of the library.

    Saving and the first evaluation are decided by StepBoundary, never by the library.
    """
    hp = run.hyperparameters
    every = run.evaluation.every_steps if evaluates else None
    schedule, shape = SCHEDULES[hp.schedule]
    features = Features.of(run)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=hp.total_steps,
        per_device_train_batch_size=hp.micro_batch_size,
        per_device_eval_batch_size=hp.micro_batch_size,
        gradient_accumulation_steps=hp.gradient_accumulation,
        learning_rate=hp.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=shape,
        # A whole number: below 1 the library would read it as a share.
        warmup_steps=round(hp.warmup_ratio * hp.total_steps),
        weight_decay=hp.weight_decay,
        max_grad_norm=hp.max_grad_norm,
        optim=OPTIMIZERS[hp.optimizer],
        bf16=hp.precision is Precision.BF16,
        fp16=hp.precision is Precision.FP16,
        activation_checkpointing=hp.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if hp.gradient_checkpointing else None,
        use_cache=False,
        neftune_noise_alpha=hp.neftune_alpha,
        torch_compile=features.compile,
        use_liger_kernel=features.liger,
        seed=hp.seed,
        average_tokens_across_devices=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        log_level_replica="error",
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        prediction_loss_only=True,
        save_strategy="no",
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_timeout=_COLLECTIVE_SECONDS,
        **_processes(run, ranks),
    )


def _processes(run: RunFile, ranks: Ranks) -> dict[str, Any]:
    on_cpu = run.resources.accelerator == "cpu"
    if run.hyperparameters.zero_stage > 0:
        return {**prepare_zero(run, ranks), "dataloader_pin_memory": not on_cpu}
    leave_out_deepspeed()
    if ranks.world_size == 1:
        # The library would take these for a gang of one and wrap the model for nothing.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}
    return {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu, "ddp_backend": "gloo" if on_cpu else "nccl"}


def check_accelerator(run: RunFile, ranks: Ranks) -> None:
    """Raises AcceleratorMismatch if the planned accelerator is not usable by this process."""
    if run.resources.accelerator == "cpu":
        return
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() <= ranks.local_rank:
        raise FinetuneError(
            f"The plan needs {run.resources.accelerator}, but this process (local rank {ranks.local_rank}) sees "
            f"{torch.cuda.device_count()} usable GPUs. Look at the node's driver and device plugin.",
            failure_class="AcceleratorMismatch",
        )
    if run.hyperparameters.precision is Precision.BF16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise FinetuneError(
            f"{torch.cuda.get_device_name()} cannot compute in BF16; set precision to FP16.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.precision",
        )
