"""The progress document: what rank 0 reports, completed by what only the agent knows."""

from __future__ import annotations

import threading

from pydantic import ValidationError

from finetune_api.documents import ProgressDocument, Stage
from finetune_api.guards import GuardState
from finetune_trainer.agent.timekeeping import Timekeeper
from finetune_trainer.agent.workdir import WorkDir

_OF_THE_AGENT = ("version", "attempt", "checkpointStep", "spent", "guards")


class ProgressBoard:
    """The newest valid progress of this attempt. Any thread may read; the main thread and the uploader write."""

    def __init__(self, attempt: int, times: Timekeeper | None = None) -> None:
        """times: the attempt's clock; None: the document does not tell where the time went."""
        self._times = times
        self._lock = threading.Lock()
        self._document = ProgressDocument(attempt=attempt, stage=Stage.STARTING, step=0, total_steps=0)
        self.fault: str | None = None
        """What is wrong with the worker's newest document; None while it is valid."""

    @property
    def document(self) -> ProgressDocument:
        """The document that is served."""
        if self._times is None:
            return self._document
        return self._document.model_copy(update={"spent": self._times.spent})

    def set(
        self,
        *,
        stage: Stage | None = None,
        total_steps: int | None = None,
        checkpoint_step: int | None = None,
        resumed_from_step: int | None = None,
    ) -> None:
        """Take over what the agent knows; None leaves a field as it is."""
        given = {
            "stage": stage,
            "total_steps": total_steps,
            "checkpoint_step": checkpoint_step,
            "resumed_from_step": resumed_from_step,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        with self._lock:
            self._document = self._document.model_copy(update=changes)

    def begin(self, step: int | None, guards: GuardState) -> None:
        """Workers are about to start from the checkpoint of step (None: from none) with these guards."""
        changes = {"step": step or 0, "checkpoint_step": step, "resumed_from_step": step, "guards": guards}
        with self._lock:
            self._document = self._document.model_copy(update=changes)

    def read_worker(self, work: WorkDir) -> None:
        """Take over rank 0's document if there is a valid one; a wrong one changes nothing but `fault`."""
        if self._times is not None:
            self._times.hear(work)
        found = work.progress()
        if found is None:
            return
        with self._lock:
            kept = self._document
            merged = {name: value for name, value in found.items() if name not in _OF_THE_AGENT}
            merged |= {"attempt": kept.attempt, "checkpointStep": kept.checkpoint_step, "guards": kept.guards}
            merged.setdefault("resumedFromStep", kept.resumed_from_step)
            try:
                self._document = ProgressDocument.from_json(merged)
                self.fault = None
            except ValidationError as error:
                first = error.errors(include_input=False, include_url=False)[0]
                self.fault = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
