"""Node 0 stores local checkpoints in the background while training goes on."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from finetune_api.failures import Fault, FinetuneError
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.serving import StartBoard
from finetune_trainer.agent.workdir import ReadyCheckpoint, WorkDir, delete_checkpoint
from finetune_trainer.sources.places import with_field
from finetune_trainer.store.errors import NodeFilesMissing, StoreError, Superseded
from finetune_trainer.store.writer import BEST, CheckpointWriter

_SCAN_SECONDS = 0.2
_RETRY_SECONDS = 15.0


@dataclass(frozen=True)
class CheckpointPolicy:
    """What is stored with each checkpoint and how many of them stay.

    keep_back: how many steps before the newest one a rollback may go back to; 0: there is none.
    nodes_seconds: how long the other nodes have for their parts of a checkpoint, after node 0's own are stored; one that
    says that it cannot bring its part is not waited for.
    storage_seconds: how long each upload may be refused for a reason that is the user's to mend, before the attempt ends.
    """

    world_size: int
    keep_last: int
    run_digest: str
    keep_back: int = 0
    nodes: int = 1
    nodes_seconds: float = 900.0
    storage_seconds: float = 600.0


class CheckpointUploader(threading.Thread):
    """One upload at a time: the newest complete checkpoint, and before it those of the best steps, which it names.

    Other older ones that were not stored are skipped, and one of which a node does not bring its part.

    The newest stored one stays on the local disk until a newer one is complete.
    """

    def __init__(
        self,
        work: WorkDir,
        writer: CheckpointWriter,
        policy: CheckpointPolicy,
        board: ProgressBoard,
        metrics: Metrics,
        gang: StartBoard,
        log: Log,
    ) -> None:
        """gang: tells the other nodes which step is stored now."""
        super().__init__(name="uploads", daemon=True)
        self._work = work
        self._writer = writer
        self._policy = policy
        self._board = board
        self._metrics = metrics
        self._gang = gang
        self._log = log
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._lost: set[int] = set()
        self._best: tuple[int, ...] = ()
        self._refused_since: float | None = None
        self.fatal: FinetuneError | None = None
        """Why the attempt has to end: a newer one owns the output, or the storage has refused uploads for too long."""
        self.last_seconds = 0.0
        """How long the last upload took."""

    def run(self) -> None:
        """Until the process ends, `close` is called or the attempt has to end."""
        while self.fatal is None and not self._closed.is_set():
            self._closed.wait(_SCAN_SECONDS if self._store_newest() else _RETRY_SECONDS)

    def settle(self, up_to: int | None) -> None:
        """The newest complete checkpoint up to that step (None: of all) is stored if it can be; then nothing any more.

        Those after it are deleted.
        """
        with self._turn:
            for found in self._work.ready_checkpoints():
                if up_to is not None and found.step > up_to:
                    delete_checkpoint(found)
        self._store_newest()
        self.close()

    def close(self) -> None:
        """Nothing is stored, skipped or deleted any more once this returns; it waits for an upload in flight."""
        self._closed.set()
        with self._turn:
            pass

    def flush(self) -> int | None:
        """Store the newest complete checkpoint if it is not stored yet; the newest stored step.

        Waits for an upload in flight. Raises the storage's error: the caller decides what that means.
        """
        self._store_newest(raising=True)
        return self._writer.newest_step

    def _store_newest(self, *, raising: bool = False) -> bool:
        with self._turn:
            if self._closed.is_set():
                return True
            try:
                self._step_of_work()
                self._refused_since = None
                return True
            except Superseded as error:
                self.fatal = error
                if raising:
                    raise
                return True
            except (FinetuneError, OSError, ValueError) as error:
                self._metrics.upload_failures.inc()
                self._log.warning("checkpoint upload failed", error=str(error), retry_seconds=_RETRY_SECONDS)
                self._look_at(error)
                if raising:
                    raise
                return False

    def _look_at(self, error: Exception) -> None:
        """An outage may pass; a refusal that lasts ends the attempt, because all that it still makes would be lost."""
        if not isinstance(error, StoreError) or error.row.fault is not Fault.USER:
            self._refused_since = None
            return
        now, stored = time.monotonic(), self._writer.newest_step
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since >= self._policy.storage_seconds:
            kept = f"the checkpoint of step {stored} is stored" if stored is not None else "no checkpoint is stored"
            self.fatal = FinetuneError(
                f"{error} Training ended because the storage refused every upload for "
                f"{round(now - self._refused_since)} s; {kept}.",
                failure_class=error.failure_class,
                field=with_field(error, "output.uri").field,
            )

    def _step_of_work(self) -> None:
        ready = self._work.ready_checkpoints()
        if not ready:
            return
        newest, stored = ready[-1], self._writer.newest_step
        self._metrics.saves_skipped.set(newest.skipped)
        pending = [found for found in ready if stored is None or found.step > stored]
        wanted = [found for found in pending if found is newest or found.step in newest.best]
        self._skip([old for old in pending if old not in wanted], "a newer one is complete")
        for checkpoint in wanted:
            self._upload(checkpoint, keep=self._stored_best(newest.best))
        for old in ready[:-1]:
            delete_checkpoint(old)

    def _skip(self, given_up: list[ReadyCheckpoint], why: str) -> None:
        # Deleted at once, so that a failed and repeated upload does not count them again.
        for old in given_up:
            self._metrics.skipped.inc()
            self._log.info("checkpoint skipped", step=old.step, why=why)
            delete_checkpoint(old)

    def _stored_best(self, named: tuple[int, ...]) -> tuple[int, ...]:
        """The best steps that are or will be stored; where none is, those before them: a resume takes what there is."""
        return tuple(step for step in named if step not in self._lost) or self._best

    def _upload(self, newest: ReadyCheckpoint, keep: tuple[int, ...]) -> None:
        begun, best = time.monotonic(), self._stored_best(newest.best)
        self._gang.storing = newest.step
        try:
            checkpoint = self._writer.commit(
                newest.step,
                newest.folder,
                world_size=self._policy.world_size,
                meta={"runDigest": self._policy.run_digest, BEST: list(best)},
                metrics=_numbers(newest.metrics),
                nodes=self._policy.nodes,
                wait_seconds=self._policy.nodes_seconds,
            )
        except NodeFilesMissing as error:
            self._log.warning("a node's part is missing", step=newest.step, error=str(error))
            self._skip([newest], "a node did not store its part of it")
            self._lost.add(newest.step)
            self._gang.stored = newest.step
            return
        self._gang.stored, self._best = newest.step, best
        self.last_seconds = time.monotonic() - begun
        self._metrics.uploaded.inc()
        self._metrics.upload_seconds.observe(self.last_seconds)
        self._board.set(checkpoint_step=newest.step)
        self._log.info(
            "checkpoint stored",
            step=newest.step,
            uri=checkpoint.uri,
            bytes=sum(part.size for part in checkpoint.manifest.parts),
            seconds=round(self.last_seconds, 2),
        )
        removed = self._writer.prune(self._policy.keep_last, keep, self._policy.keep_back)
        if removed:
            self._log.info("checkpoints pruned", steps=list(removed))


def _numbers(metrics: dict[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
