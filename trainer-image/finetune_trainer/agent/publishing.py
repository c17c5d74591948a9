"""The end of the work: the last checkpoint is stored, and after success the artifact published."""

from __future__ import annotations

import time
from dataclasses import dataclass

from finetune_api.documents import Stage
from finetune_api.failures import FinetuneError
from finetune_trainer.agent.ending import STOPPED, End, from_error
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.stopping import OutOfTime, StopSignal, run_until
from finetune_trainer.agent.supervision import Supervisor
from finetune_trainer.agent.uploads import CheckpointUploader
from finetune_trainer.agent.workdir import Result, WorkDir
from finetune_trainer.store.artifacts import publish
from finetune_trainer.store.errors import BucketNotFound, CredentialsRejected, StorageUnavailable
from finetune_trainer.store.writer import CheckpointWriter

_RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Publisher:
    """What node 0 does after its workers ended."""

    work: WorkDir
    writer: CheckpointWriter
    uploader: CheckpointUploader
    supervisor: Supervisor
    stop: StopSignal
    board: ProgressBoard
    log: Log

    def publish(self) -> Result:
        """The artifact is published; returns rank 0's result.

        Raises FinetuneError of the storage, Internal if the workers left no artifact, OutOfTime.
        """
        result = self.work.result()
        if result is None or not self.work.artifact_is_ready():
            raise FinetuneError("the workers ended well but left no artifact or no result", failure_class="Internal")
        self.board.set(stage=Stage.PUBLISHING)
        run_until(self.supervisor.stop_is_over, self._publish_patiently)
        self.board.set(stage=Stage.DONE)
        self.log.info("artifact published", uri=self.writer.store.uri(self.writer.prefix))
        return result

    def store_last_checkpoint(self, end: End) -> End:
        """end, with what became of the newest local checkpoint; bounded by the stop budget."""
        limit = time.monotonic() + self.supervisor.settings.stop_seconds
        trouble = ""
        try:
            run_until(lambda: time.monotonic() > limit or self.supervisor.stop_is_over(), self.uploader.flush)
        except OutOfTime:
            trouble = " The last local checkpoint could not be stored in time."
        except (FinetuneError, OSError, ValueError) as error:
            trouble = f" The last local checkpoint could not be stored: {from_error(error).message}"
        self.log.info("last checkpoint", stored_step=self.writer.newest_step, trouble=trouble.strip() or None)
        if end.outcome != STOPPED:
            return end
        stored = self.writer.newest_step
        kept = f" The checkpoint of step {stored} is stored." if stored is not None else " No checkpoint is stored yet."
        return End(end.outcome, end.message + kept + trouble, end.field)

    def _publish_patiently(self) -> None:
        # A finished run is worth more patience than one request: the storage may be back, or mended, in minutes.
        deadline = time.monotonic() + self.supervisor.settings.storage_seconds
        while True:
            try:
                self.uploader.flush()
                publish(self.writer, self.work.artifact)
                return
            except (StorageUnavailable, CredentialsRejected, BucketNotFound) as error:
                if time.monotonic() > deadline:
                    raise
                self.log.warning("publishing failed", error=str(error), retry_seconds=_RETRY_SECONDS)
                time.sleep(_RETRY_SECONDS)
