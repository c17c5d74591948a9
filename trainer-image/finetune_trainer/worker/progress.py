"""The progress file of each node's first rank, by which its agent knows stage and step. Node 0's is served."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from finetune_api.documents import ProgressDocument, Stage
from finetune_trainer.agent.workdir import write_whole

_INTERVAL_SECONDS = 1.0


class Progress:
    """Writes progress.json at most once a second, and at once a new stage and the first figures in it.

    path None: this process keeps no progress (every rank but the node's first).
    """

    def __init__(self, path: Path | None, *, total_steps: int, resumed_from_step: int | None) -> None:
        self._path = path
        self._last = 0.0
        self._document = ProgressDocument(
            attempt=0,
            stage=Stage.STARTING,
            step=resumed_from_step or 0,
            total_steps=total_steps,
            resumed_from_step=resumed_from_step,
        )
        self._write()

    def stage(self, stage: Stage) -> None:
        """Enter stage; written at once."""
        self._document = self._document.model_copy(update={"stage": stage})
        self._write()
        # The next figures are told at once: from the first step on the agent knows how long one takes.
        self._last = 0.0

    def update(self, **fields: Any) -> None:
        """Take new values of ProgressDocument's fields; a value that is not finite is left out."""
        finite = {k: v for k, v in fields.items() if not (isinstance(v, float) and not math.isfinite(v))}
        self._document = self._document.model_copy(update=finite)
        if time.monotonic() - self._last >= _INTERVAL_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._last = time.monotonic()
        document = self._document.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"attempt", "checkpoint_step"}
        )
        write_whole(self._path, json.dumps(document))
