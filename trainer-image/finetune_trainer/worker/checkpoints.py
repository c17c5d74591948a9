"""Checkpoints on local disk: what is in one and when it counts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.workdir import write_whole
from finetune_trainer.worker.supervision import Supervision

# Both are written by the libraries unasked: the first is a pickle, the second a script.
_NEVER_KEPT = ("training_args.bin", "zero_to_fp32.py")
PLAN_FILE = "plan.json"


def partial_folder(scratch: Path, state: TrainerState) -> Path:
    """Where the library writes the checkpoint of this step, before it is complete."""
    return scratch / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def commit(scratch: Path, state: TrainerState, supervision: Supervision) -> None:
    """Turn the library's finished folder into step-<n> and, when all ranks are through, mark it ready."""
    work, ranks = supervision.work, supervision.ranks
    step = state.global_step
    partial = partial_folder(scratch, state)
    _barrier()
    if ranks.is_node_main:
        for name in _NEVER_KEPT:
            for path in partial.rglob(name):
                path.unlink()
        if ranks.is_main:
            supervision.carry.save(partial)
            write_whole(partial / PLAN_FILE, json.dumps({"worldSize": ranks.world_size, "step": step}))
        folder = work.checkpoints / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    _barrier()
    if ranks.is_node_main:
        marker = {"step": step, "metrics": _metrics(state), "best": supervision.carry.best_steps}
        write_whole(work.checkpoints / f"step-{step}.ready", json.dumps(marker))
    supervision.save_policy.last_saved = time.monotonic()


def _metrics(state: TrainerState) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in state.log_history:
        for key, name in (("loss", "loss"), ("eval_loss", "evalLoss")):
            if key in entry:
                found[name] = entry[key]
    return found


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def require_finite(model: nn.Module) -> None:
    """Raises NonFiniteLoss if a weight that trains is not finite; under ZeRO this rank's share is looked at."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all():
            raise FinetuneError(
                f"The weight {name} is not finite; the checkpoint was not written. Lower hyperparameters.learningRate.",
                failure_class="NonFiniteLoss",
                field="spec.hyperparameters.learningRate",
            )
