"""Stores local checkpoints in the background while training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.workdir import ReadyCheckpoint, WorkDir
from finetune_trainer.store.errors import Superseded
from finetune_trainer.store.writer import CheckpointWriter

_SCAN_SECONDS = 0.2
_RETRY_SECONDS = 15.0


@dataclass(frozen=True)
class CheckpointPolicy:
    """What is stored with each checkpoint and how many of them stay."""

    world_size: int
    keep_last: int
    run_digest: str


class CheckpointUploader(threading.Thread):
    """One upload at a time: the newest complete checkpoint, and before it those of the best steps, which it names.

    Other older ones that were not stored are skipped.

    The newest stored one stays on the local disk until a newer one is complete.
    """

    def __init__(
        self,
        work: WorkDir,
        writer: CheckpointWriter,
        policy: CheckpointPolicy,
        board: ProgressBoard,
        metrics: Metrics,
        log: Log,
    ) -> None:
        super().__init__(name="uploads", daemon=True)
        self._work = work
        self._writer = writer
        self._policy = policy
        self._board = board
        self._metrics = metrics
        self._log = log
        self._turn = threading.Lock()
        self.superseded: Superseded | None = None
        """Set once a newer attempt owns the output: nothing is stored any more."""
        self.last_seconds = 0.0
        """How long the last upload took."""

    def run(self) -> None:
        """Until the process ends, or a newer attempt has taken over."""
        while self.superseded is None:
            time.sleep(_SCAN_SECONDS if self._store_newest() else _RETRY_SECONDS)

    def flush(self) -> int | None:
        """Store the newest complete checkpoint if it is not stored yet; the newest stored step.

        Waits for an upload in flight. Raises the storage's error: the caller decides what that means.
        """
        self._store_newest(raising=True)
        return self._writer.newest_step

    def _store_newest(self, *, raising: bool = False) -> bool:
        with self._turn:
            try:
                self._step_of_work()
                return True
            except Superseded as error:
                self.superseded = error
                if raising:
                    raise
                return True
            except (FinetuneError, OSError, ValueError) as error:
                self._metrics.upload_failures.inc()
                self._log.warning("checkpoint upload failed", error=str(error), retry_seconds=_RETRY_SECONDS)
                if raising:
                    raise
                return False

    def _step_of_work(self) -> None:
        ready = self._work.ready_checkpoints()
        if not ready:
            return
        newest, stored = ready[-1], self._writer.newest_step
        pending = [found for found in ready if stored is None or found.step > stored]
        wanted = [found for found in pending if found is newest or found.step in newest.best]
        self._skip([old for old in pending if old not in wanted])
        for checkpoint in wanted:
            self._upload(checkpoint, keep=newest.best)
        for old in ready[:-1]:
            _delete(old)

    def _skip(self, given_up: list[ReadyCheckpoint]) -> None:
        # Deleted at once, so that a failed and repeated upload does not count them again.
        for old in given_up:
            self._metrics.skipped.inc()
            self._log.info("checkpoint skipped", step=old.step, why="a newer one is complete")
            _delete(old)

    def _upload(self, newest: ReadyCheckpoint, keep: tuple[int, ...]) -> None:
        begun = time.monotonic()
        checkpoint = self._writer.commit(
            newest.step,
            newest.folder,
            world_size=self._policy.world_size,
            meta={"runDigest": self._policy.run_digest},
            metrics=_numbers(newest.metrics),
        )
        self.last_seconds = time.monotonic() - begun
        self._metrics.uploaded.inc()
        self._metrics.upload_seconds.observe(self.last_seconds)
        self._board.set(checkpoint_step=newest.step)
        size = sum(part.size for part in checkpoint.manifest.parts)
        self._log.info(
            "checkpoint stored", step=newest.step, uri=checkpoint.uri, bytes=size, seconds=round(self.last_seconds, 2)
        )
        removed = self._writer.prune(self._policy.keep_last, keep)
        if removed:
            self._log.info("checkpoints pruned", steps=list(removed))


def _numbers(metrics: dict[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _delete(checkpoint: ReadyCheckpoint) -> None:
    # The marker first: a folder without one does not count.
    checkpoint.marker.unlink(missing_ok=True)
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
