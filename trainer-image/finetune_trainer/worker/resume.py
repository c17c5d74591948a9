"""A restored checkpoint: where it lies, what has to be in it, and what is refused when it is taken up."""

from __future__ import annotations

import json
import pickle
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import set_seed
from transformers.trainer_pt_utils import safe_globals

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.carry import Carry
from finetune_trainer.worker.checkpoints import PLAN_FILE
from finetune_trainer.worker.ranks import Ranks

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_STATE = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|.*_(model|optim)_states\.pt")
"""Names of torch's own state files: plain types only, which weights-only loading lets through."""
_ZERO_STATE = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""The plain types in DeepSpeed's shards."""


def allow_zero_state() -> None:
    """Name the plain types of DeepSpeed's shards, so that they load under weights-only."""
    torch.serialization.add_safe_globals([pkgutil.resolve_name(name) for name in _ZERO_STATE])


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


def processes_of(folder: Path) -> int:
    """How many processes wrote a restored checkpoint; raises CheckpointInvalid."""
    try:
        return int(json.loads((folder / PLAN_FILE).read_text())["worldSize"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _invalid(f"its {PLAN_FILE} cannot be read ({error})") from error


def require_state(folder: Path, ranks: Ranks, *, zero: bool, scaled: bool) -> None:
    """Raises unless all that this rank goes on from is there and safe to load: CheckpointInvalid, UnsafeFile.

    The library passes over missing files in silence. zero: whether DeepSpeed shards the state; InvalidSpec where that
    was done for another number of processes. scaled: whether gradients are scaled (FP16).
    """
    refuse_pickles(folder)
    written, world_size = processes_of(folder), ranks.world_size
    # DeepSpeed's universal checkpoint would allow it, but its conversion wants all shards on one disk, and twice again.
    if zero and written != world_size:
        raise FinetuneError(
            f"The checkpoint was written by {written} processes, and this run has {world_size}. Under ZeRO each process "
            f"holds a shard of the optimizer's state, so the number of processes of the run has to be {written}. Ask for "
            f"as many GPUs as before, or start again with another output.uri.",
            failure_class="InvalidSpec",
            field="spec.resources.gpus",
        )
    needed = ["scheduler.pt"]
    if not zero:
        needed += ["optimizer.pt", *(["scaler.pt"] if scaled else [])]
    if written == world_size:
        needed.append(_random_state_file(folder, ranks).name)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise _invalid(f"it lacks {', '.join(missing)}")


def require_same_steps(carry: Carry, *, step_records: int, epoch_records: int) -> None:
    """A step of this run takes as many records as one of the checkpoint did, and an epoch has as many; noted at first.

    Only then do step numbers, schedule and the position in an epoch mean the same. Raises InvalidSpec for another
    effective batch, CheckpointInvalid for other records.
    """
    if carry.step_records not in (0, step_records):
        raise FinetuneError(
            f"The checkpoint was written with an effective batch of {carry.step_records} records, and this run has "
            f"{step_records}: its steps, schedule and order of records would be others. Set "
            f"hyperparameters.globalBatchSize to {carry.step_records}, or start again with another output.uri.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.globalBatchSize",
        )
    if carry.epoch_records not in (0, epoch_records):
        raise _invalid(
            f"it stands in an epoch of {carry.epoch_records} training sequences, and the data now gives {epoch_records}, "
            "as where other records are read or packed otherwise on another kind of GPU"
        )
    carry.step_records, carry.epoch_records = step_records, epoch_records


def random_state_fits(folder: Path, ranks: Ranks) -> bool:
    """Whether the checkpoint holds the random state of this process: as many processes, each with as many GPUs."""
    if processes_of(folder) != ranks.world_size:
        return False
    with safe_globals():
        state = torch.load(_random_state_file(folder, ranks), weights_only=True).get("cuda")
    # Of several processes each keeps the states of all GPUs that it sees, a lone one that of its own.
    seen = torch.cuda.device_count()
    return len(state) == seen if isinstance(state, list) else (state is not None) == (seen > 0)


def derive_random_state(seed: int, step: int, rank: int) -> None:
    """Random states of Python, NumPy and torch that depend on the run's seed, the step and the rank only."""
    set_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def _random_state_file(folder: Path, ranks: Ranks) -> Path:
    return folder / ("rng_state.pth" if ranks.world_size == 1 else f"rng_state_{ranks.rank}.pth")


def refuse_pickles(folder: Path) -> None:
    """Raises UnsafeFile for a file of a restored checkpoint that is a pickle, or names code beyond plain state.

    Nothing is loaded: torch's own files are taken apart, and all else that ends like a pickle has no place here.
    """
    with safe_globals():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".safetensors" and not _is_safetensors(path):
                raise _unsafe(f"{name} is not a file of safetensors")
            if path.suffix not in _PICKLES:
                continue
            if not _STATE.fullmatch(path.name):
                raise _unsafe(f"{name} is a pickle that no run writes")
            try:
                found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(_ZERO_STATE)
            except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
                raise _unsafe(f"{name} is not a file of torch.save") from error
            if found:
                raise _unsafe(f"{name} asks for {', '.join(sorted(found)[:3])}")


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


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


def _unsafe(why: str) -> FinetuneError:
    return FinetuneError(
        f"The restored checkpoint was refused, because loading it could run code: {why}.", failure_class="UnsafeFile"
    )


def _invalid(why: str) -> FinetuneError:
    return FinetuneError(f"The restored checkpoint cannot be used: {why}.", failure_class="CheckpointInvalid")
