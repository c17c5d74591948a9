"""The best step of a run by what its evaluations measure: found, kept, and taken back at the end.

The best checkpoint is known by its step alone: the agent stores it and brings it back to WORK/best for a later attempt.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune_api.failures import FinetuneError
from finetune_api.metrics import LOSS, cost
from finetune_api.runfile import RunFile
from finetune_trainer.worker.carry import Carry
from finetune_trainer.worker.ranks import Ranks
from finetune_trainer.worker.resume import refuse_pickles
from finetune_trainer.worker.supervision import Supervision

# What a plain checkpoint holds only to train on.
_NOT_WEIGHTS = ("optimizer.pt", "scheduler.pt")
# DeepSpeed's names.
_LATEST = "latest"
_MODEL_STATE = "mp_rank_00_model_states.pt"
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class BestPolicy:
    """keep: how many of the best steps stay; 0: the last step is published, whatever was measured.

    metric: what tells the best, as finetune_api.metrics names it. patience: evaluations in a row without an improvement of
    more than min_delta after which the run ends; None: never.
    """

    keep: int
    metric: str = LOSS
    patience: int | None = None
    min_delta: float = 0.0

    @classmethod
    def of(cls, run: RunFile) -> BestPolicy:
        """What the run file plans."""
        early = run.hyperparameters.early_stopping
        if early is None:
            return cls(run.checkpoint.keep_best, run.checkpoint.best_metric)
        return cls(max(run.checkpoint.keep_best, 1), run.checkpoint.best_metric, early.patience, early.min_delta)

    def adopt(self, carry: Carry) -> None:
        """A run that goes on from one with another metric knows no best step yet."""
        if carry.best_metric != self.metric:
            carry.best, carry.waited, carry.best_metric = [], 0, self.metric

    def judge(self, carry: Carry, step: int, measured: Mapping[str, float]) -> bool:
        """Take an evaluation into carry; True if its step is now among the best ones.

        measured: as measuring.logged_metrics gives it.
        """
        if not self.keep or step in carry.best_steps:
            return False
        value, by = measured[self.metric], partial(cost, self.metric)
        improved = not carry.best or by(value) < by(carry.best[0][1]) - self.min_delta
        carry.waited = 0 if improved else carry.waited + 1
        carry.stopped_early = self.patience is not None and carry.waited >= self.patience
        # The sort is stable: of equal steps the earlier one is the better one.
        carry.best = sorted([*carry.best, [step, value]], key=lambda found: by(found[1]))[: self.keep]
        return step in carry.best_steps


def keep_weights(checkpoint: Path, supervision: Supervision) -> None:
    """WORK/best holds the weights of checkpoint, on each node that has any. Linked, so that it costs no space of its own."""
    if not supervision.ranks.is_node_main:
        return
    best = supervision.work.best
    fresh = best.with_name(".best")
    shutil.rmtree(fresh, ignore_errors=True)
    left_out = () if supervision.zero_stage > 0 else _NOT_WEIGHTS
    shutil.copytree(checkpoint, fresh, copy_function=os.link, ignore=shutil.ignore_patterns(*left_out))
    shutil.rmtree(best, ignore_errors=True)
    fresh.rename(best)


def take_best(engine: Any) -> bool:
    """The model's weights are those of the best step; whether they had to be changed for that.

    Every rank calls it. Raises CheckpointInvalid.
    """
    supervision = engine.supervision
    best = next(iter(supervision.carry.best_steps), engine.state.global_step)
    if best == engine.state.global_step:
        return False
    folder = supervision.work.best
    if not folder.is_dir() and (supervision.ranks.is_main or supervision.zero_stage > 0):
        raise FinetuneError(
            f"Step {best} was the best one, but its checkpoint is gone. Do not edit the checkpoints of a run.",
            failure_class="CheckpointInvalid",
        )
    if supervision.zero_stage > 0 and supervision.ranks.world_size > supervision.ranks.local_world_size:
        with supervision.heartbeat.long_phase():
            complete_shards(folder, supervision, engine.args.device)
    if folder.is_dir():
        refuse_pickles(folder)
    if supervision.zero_stage > 0:
        from peft import PeftModel
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        strict = not isinstance(engine.model, PeftModel)
        deepspeed_load_checkpoint(engine.model_wrapped, str(folder), load_module_strict=strict)
        return True
    if supervision.ranks.is_main:
        engine._load_from_checkpoint(str(folder), engine.model)
    if torch.distributed.is_initialized():
        # Only the first node's checkpoint holds weights.
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.data, src=0)
    return True


def complete_shards(folder: Path, supervision: Supervision, device: torch.device) -> None:
    """Each node's own shards in folder are a checkpoint that DeepSpeed loads: with what only rank 0 has written.

    That is the name of the newest, and below stage 3 the model's state. Every rank calls it.
    """
    ranks, shards = supervision.ranks, next(folder.glob("global_step*"))
    if ranks.is_node_main and not (folder / _LATEST).exists():
        (folder / _LATEST).write_text(shards.name)
    if supervision.zero_stage < 3:
        _send_file(shards / _MODEL_STATE, ranks, device)
    torch.distributed.barrier()


def _send_file(path: Path, ranks: Ranks, device: torch.device) -> None:
    """Rank 0's file is on the other nodes too."""
    target = path if ranks.is_node_main else Path(os.devnull)
    size = torch.tensor([path.stat().st_size if ranks.is_main else 0], device=device)
    torch.distributed.broadcast(size, src=0)
    with target.open("rb" if ranks.is_main else "wb") as file:
        for start in range(0, int(size), _PIECE_BYTES):
            piece = torch.empty(min(_PIECE_BYTES, int(size) - start), dtype=torch.uint8)
            if ranks.is_main:
                file.readinto(piece.numpy())
            piece = piece.to(device)
            torch.distributed.broadcast(piece, src=0)
            if not ranks.is_main:
                file.write(piece.cpu().numpy())
