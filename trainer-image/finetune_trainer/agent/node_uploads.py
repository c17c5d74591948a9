"""What the nodes after the first store: their own ranks' files of each checkpoint, which node 0 commits with its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_trainer.agent import peers
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.workdir import ReadyCheckpoint, WorkDir, delete_checkpoint
from finetune_trainer.store.errors import Superseded
from finetune_trainer.store.nodes import NodeUploader

_POLL_SECONDS = 0.5
_RETRY_SECONDS = 5.0
# Node 0 has ended if it does not answer as often as this in a row.
_TRIES = 6


class NodeUploads(threading.Thread):
    """Stores this node's part of the very steps that node 0 stores, one at a time, in the background.

    Node 0 says which step that is. A part that cannot be stored is given up, so that node 0 goes on to a newer step
    at once. Local checkpoints that it will not ask for any more are deleted.
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
        self.fatal: Superseded | None = None
        """Why the attempt has to end: a newer one owns the output, and nothing is stored any more."""
        self.last_seconds = 0.0
        """How long the last upload took."""

    def run(self) -> None:
        """Until the process ends, or a newer attempt has taken over."""
        while self.fatal is None:
            time.sleep(_POLL_SECONDS)
            self._follow()

    def flush(self, *, until_its_end: bool) -> bool:
        """Stay until node 0 needs nothing of this node any more, or until its end; False if it does not answer.

        The workers have ended.
        """
        silent = 0
        while silent < _TRIES and self.fatal is None:
            newest = max((ready.step for ready in self._work.ready_checkpoints()), default=None)
            told = self._follow(ended=True)
            silent = 0 if told is not None else silent + 1
            stored = told is not None and (newest is None or (told.get("stored") or 0) >= newest)
            if stored and not until_its_end:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _follow(self, *, ended: bool = False) -> dict[str, Any] | None:
        """One look at what node 0 stores, and this node's part of it. ended: no checkpoint is made here any more."""
        with self._turn:
            told = self._ask()
            if told is None:
                return None
            storing, stored = told.get("storing") or 0, told.get("stored") or 0
            ready = {found.step: found for found in self._work.ready_checkpoints()}
            if storing > stored and storing != self._done:
                self._answer(storing, ready, ended)
            for found in ready.values():
                if found.step < max(storing, stored):
                    delete_checkpoint(found)
            return told

    def _answer(self, step: int, ready: dict[int, ReadyCheckpoint], ended: bool) -> None:
        """This node's part of the step that node 0 waits for, or the word that it does not come."""
        try:
            if step in ready:
                self._store(ready[step])
            elif ended:
                self._give_up(step, "the workers of this node ended before they had made it")
            elif ready and max(ready) > step:  # checkpoints are made in the order of their steps
                self._give_up(step, "it has made a later checkpoint, but none of this step")
        except Superseded as error:
            self.fatal = error
        except (FinetuneError, OSError) as error:
            self._log.warning("checkpoint upload failed", step=step, error=str(error), retry_seconds=_RETRY_SECONDS)
            time.sleep(_RETRY_SECONDS)

    def _store(self, part: ReadyCheckpoint) -> None:
        begun = time.monotonic()
        try:
            self._uploader.upload(part.step, part.folder)
        except Superseded:
            raise
        except ValueError as error:  # what is wrong with the files stays wrong
            self._give_up(part.step, str(error))
        except (FinetuneError, OSError) as error:
            later = [found for found in self._work.ready_checkpoints() if found.step > part.step]
            if not later or part.step in later[-1].best:
                raise
            self._give_up(part.step, f"a later one is complete, and this one met: {error}")
        else:
            self._done = part.step
            self.last_seconds = time.monotonic() - begun
            self._log.info("checkpoint part stored", step=part.step, seconds=round(self.last_seconds, 2))

    def _give_up(self, step: int, why: str) -> None:
        self._uploader.give_up(step, why)
        self._done = step
        self._log.warning("checkpoint part given up", step=step, why=why)


def asking(host: str, port: int, attempt: int) -> Callable[[], dict[str, Any] | None]:
    """How a node learns what node 0 stores in this attempt."""

    def ask() -> dict[str, Any] | None:
        told, _ = peers.ask(host, port, "/checkpoint")
        return told if told is not None and told.get("attempt") == attempt else None

    return ask
