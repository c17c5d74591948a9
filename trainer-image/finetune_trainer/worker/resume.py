"""A restored checkpoint: where it lies, what has to be in it, and what is refused when it is taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.checkpoints import PLAN_FILE
from finetune_trainer.worker.ranks import Ranks


def allow_zero_state() -> None:
    """Name the plain types of DeepSpeed's shards, so that they load under weights-only."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def resume_folder(work: WorkDir) -> Path | None:
    """The restored checkpoint, if there is one."""
    return work.resume if work.resume.is_dir() and any(work.resume.iterdir()) else None


def resumed_step(folder: Path | None) -> int | None:
    """The step that a restored checkpoint was written at; raises CheckpointInvalid."""
    if folder is None:
        return None
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _invalid(f"its trainer_state.json cannot be read ({error})") from error


def require_state(folder: Path, ranks: Ranks, *, zero: bool) -> None:
    """Raises CheckpointInvalid unless optimizer, schedule and random state of this rank are there.

    The library passes over missing files in silence. A checkpoint fits its own number of processes only: ZeRO's
    shards and the random states are one per process.
    """
    world_size = ranks.world_size
    try:
        saved = json.loads((folder / PLAN_FILE).read_text())["worldSize"]
    except (OSError, ValueError, KeyError) as error:
        raise _invalid(f"its {PLAN_FILE} cannot be read ({error})") from error
    if saved != world_size:
        raise _invalid(f"it was written by {saved} processes, and this run has {world_size}")
    random_state = "rng_state.pth" if world_size == 1 else f"rng_state_{ranks.rank}.pth"
    needed = ["scheduler.pt", random_state] + ([] if zero else ["optimizer.pt"])
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise _invalid(f"it lacks {', '.join(missing)}")


def require_complete(model: nn.Module, load_result: Any) -> None:
    """Raises CheckpointInvalid if weights were missing or unexpected; a tied weight may be stored once."""
    loaded = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n not in load_result.missing_keys}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in load_result.missing_keys if id(by_name.get(name)) not in loaded]
    wrong = sorted([*missing, *load_result.unexpected_keys])
    if wrong:
        raise _invalid(f"its weights do not fit the model: {', '.join(wrong[:5])}")


def plan_learning_rate(optimizer: Any, scheduler: Any, planned: float) -> None:
    """Bring a restored schedule to the planned peak rate; the library would keep the stored one without a word."""
    rates = getattr(scheduler, "base_lrs", None)
    if not rates or rates[0] == planned or rates[0] == 0:
        return
    scale = planned / rates[0]
    scheduler.base_lrs = [rate * scale for rate in rates]
    scheduler._last_lr = [rate * scale for rate in scheduler._last_lr]
    for group in optimizer.param_groups:
        group["lr"] *= scale
        group["initial_lr"] = planned


def _invalid(why: str) -> FinetuneError:
    return FinetuneError(f"The restored checkpoint cannot be used: {why}.", failure_class="CheckpointInvalid")
