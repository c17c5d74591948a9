"""Checkpoints on local disk: what is in one, who writes it, and when it counts."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.agent.workdir import write_whole
from finetune_trainer.worker.faults import Stopped
from finetune_trainer.worker.log import open_log
from finetune_trainer.worker.snapshot import Snapshot
from finetune_trainer.worker.supervision import Supervision

PLAN_FILE = "plan.json"
# Left by DeepSpeed unasked.
_SCRIPT = "zero_to_fp32.py"
_POLL_SECONDS = 0.02
# How long the last checkpoint of a run that failed may wait for other ranks, which may have ended.
_PATIENCE_SECONDS = 10.0


class Checkpoints:
    """The checkpoints of one process: copied to host memory at a step's boundary, written by a thread, one at a time.

    Every rank writes files of its own, without a collective. The node's first rank marks the folder ready when all
    ranks of the node are through; a rank that dies or fails leaves a folder that never counts.
    """

    def __init__(self, scratch: Path, supervision: Supervision) -> None:
        """scratch: where the library writes, on the disk of the finished checkpoints."""
        self.skipped = 0
        """How often a save was due while one was being written, and was left out."""
        self._scratch = scratch
        self._control = supervision
        self._snapshot = Snapshot(supervision.ranks.local_world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._leaving = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """At the end no checkpoint is being written any more: each is complete, or the reason why not is raised.

        Whatever comes after training has the memory of the copies.
        """
        try:
            yield
        except Stopped:
            self.finish()
            raise
        except BaseException:
            self._leave()
            raise
        self.finish()
        self._snapshot.release()

    # ---- on the training thread

    def is_writing(self) -> bool:
        """Whether this rank is not yet through with the checkpoint before."""
        return self._writing is not None and not self._writing.done()

    def raise_failure(self) -> None:
        """Raises what ended the last write, if it failed."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def finish(self) -> None:
        """Wait until no rank writes; every rank calls it. Raises what ended this rank's write."""
        heartbeat = self._control.heartbeat
        with heartbeat.during(Activity.SAVING), heartbeat.long_phase():
            if self._writing is not None:
                self._writing.result()
            _barrier()

    def skip(self, step: int) -> None:
        """Leave out the save of step, which is due; the next one is due an interval later."""
        self.skipped += 1
        self._control.save_policy.last_saved = time.monotonic()
        if self._control.ranks.is_main:
            why = "the one before is still being written; choose a longer checkpoint.everySteps or everyMinutes"
            open_log(rank=self._control.ranks.rank).warning("save-skipped", step=step, skipped=self.skipped, why=why)

    @contextmanager
    def taking(
        self, state: TrainerState, on_complete: Callable[[Path], None] | None
    ) -> Iterator[tuple[Snapshot, Path]]:
        """Inside, the library and the engine write the checkpoint of this step; its tensors are written after the end.

        Waits for the checkpoint before. Gives the snapshot and the folder to write into; every rank calls it.
        on_complete: called with the finished folder by the node's first rank, from the thread, before it counts.
        """
        self.finish()
        step, ranks = state.global_step, self._control.ranks
        partial = self._scratch / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        partial.mkdir(parents=True, exist_ok=True)
        with self._snapshot.taking():
            yield self._snapshot, partial
        if ranks.is_main:
            self._control.carry.save(partial)
            write_whole(partial / PLAN_FILE, json.dumps({"worldSize": ranks.world_size, "step": step}))
        best = self._control.carry.best_steps
        marker = {"step": step, "metrics": _metrics(state), "best": best, "skipped": self.skipped}
        self._control.save_policy.last_saved = time.monotonic()
        self._writing = self._thread.submit(self._write, partial, marker, on_complete)
        _barrier()

    def _leave(self) -> None:
        self._leaving.set()
        with self._control.heartbeat.long_phase():
            self._thread.shutdown(wait=True)

    # ---- on the thread

    def _write(self, partial: Path, marker: dict[str, Any], on_complete: Callable[[Path], None] | None) -> None:
        ranks, work = self._control.ranks, self._control.work
        try:
            self._snapshot.write()
        except BaseException:
            self._snapshot.discard()
            raise
        through = [partial.with_name(f"{partial.name}.rank-{rank}") for rank in range(ranks.local_world_size)]
        through[ranks.local_rank].touch()
        if not ranks.is_node_main or not self._appear(through):
            return
        for path in [*partial.rglob(_SCRIPT), *through]:
            path.unlink()
        folder = work.checkpoints / f"step-{marker['step']}"
        ready = folder.with_name(f"{folder.name}.ready")
        ready.unlink(missing_ok=True)  # of workers that were started again in this attempt
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        if on_complete is not None:
            on_complete(folder)
        write_whole(ready, json.dumps(marker))

    def _appear(self, files: list[Path]) -> bool:
        patience = _PATIENCE_SECONDS
        while not all(file.exists() for file in files):
            if patience <= 0:
                return False
            time.sleep(_POLL_SECONDS)
            patience -= _POLL_SECONDS if self._leaving.is_set() else 0
        return True


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


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by its names. A walk through all modules, so not one for each save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_finite(weights: Mapping[str, nn.Parameter]) -> None:
    """Raises NonFiniteLoss if one of the weights is not finite; under ZeRO this rank's share is looked at."""
    shares = {name: getattr(p, "ds_tensor", p).detach() for name, p in weights.items()}
    # Quick, and enough almost always: a sum is finite only if all that it adds is.
    if not shares or torch.stack([w.sum(dtype=torch.float32) for w in shares.values()]).isfinite().all():
        return
    for name, weight in shares.items():
        if not torch.isfinite(weight).all():
            raise FinetuneError(
                f"The weight {name} is not finite; the checkpoint was not written. Lower hyperparameters.learningRate.",
                failure_class="NonFiniteLoss",
                field="spec.hyperparameters.learningRate",
            )
