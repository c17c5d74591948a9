"""What the nodes after the first store: their own ranks' files of each checkpoint, which node 0 commits with its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_trainer.agent import peers
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.workdir import WorkDir, delete_checkpoint
from finetune_trainer.store.errors import Superseded
from finetune_trainer.store.nodes import NodeUploader

_POLL_SECONDS = 0.5
_RETRY_SECONDS = 5.0
# Node 0 has ended if it does not answer as often as this in a row.
_TRIES = 6


class NodeUploads(threading.Thread):
    """Stores this node's part of the very steps that node 0 stores, one at a time, in the background.

    Node 0 says which step that is. Local checkpoints that it will not ask for any more are deleted.
    """

    def __init__(
        self, work: WorkDir, uploader: NodeUploader, ask: Callable[[], dict[str, Any] | None], log: Log
    ) -> None:
        """ask: what node 0 tells at /checkpoint; None if it does not answer, or runs another attempt."""
        super().__init__(name="uploads", daemon=True)
        self._work = work
        self._uploader = uploader
        self._ask = ask
        self._log = log
        self._turn = threading.Lock()
        self._done: int | None = None
        self.superseded: Superseded | None = None
        """Set once a newer attempt owns the output: nothing is stored any more."""
        self.last_seconds = 0.0
        """How long the last upload took."""

    def run(self) -> None:
        """Until the process ends, or a newer attempt has taken over."""
        while self.superseded is None:
            time.sleep(_POLL_SECONDS)
            self._follow()

    def flush(self) -> bool:
        """Stay until node 0 needs nothing of this node any more; False if it does not answer.

        The workers have ended.
        """
        silent = 0
        while silent < _TRIES and self.superseded is None:
            newest = max((ready.step for ready in self._work.ready_checkpoints()), default=None)
            told = self._follow()
            silent = 0 if told is not None else silent + 1
            if told is not None and (newest is None or (told.get("stored") or 0) >= newest):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _follow(self) -> dict[str, Any] | None:
        """One look at what node 0 stores, and this node's part of it."""
        with self._turn:
            told = self._ask()
            if told is None:
                return None
            storing, stored = told.get("storing"), told.get("stored")
            for ready in self._work.ready_checkpoints():
                if ready.step == storing and storing != self._done:
                    self._store(ready.step)
                if ready.step < max(storing or 0, stored or 0):
                    delete_checkpoint(ready)
            return told

    def _store(self, step: int) -> None:
        begun = time.monotonic()
        try:
            self._uploader.upload(step, self._work.checkpoints / f"step-{step}")
        except Superseded as error:
            self.superseded = error
        except (FinetuneError, OSError, ValueError) as error:
            self._log.warning("checkpoint upload failed", step=step, error=str(error), retry_seconds=_RETRY_SECONDS)
            time.sleep(_RETRY_SECONDS)
        else:
            self._done = step
            self.last_seconds = time.monotonic() - begun
            self._log.info("checkpoint part stored", step=step, seconds=round(self.last_seconds, 2))


def asking(host: str, port: int, attempt: int) -> Callable[[], dict[str, Any] | None]:
    """How a node learns what node 0 stores in this attempt."""

    def ask() -> dict[str, Any] | None:
        told, _ = peers.ask(host, port, "/checkpoint")
        return told if told is not None and told.get("attempt") == attempt else None

    return ask
