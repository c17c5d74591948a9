"""What a run knows besides weights and the library's own state; it travels in the checkpoint."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import FinetuneError
from finetune_api.metrics import LOSS
from finetune_trainer.agent.workdir import write_whole

CARRY_FILE = "run.json"


@dataclass
class Carry:
    """Who the run is, results of the untuned base, and sums over all attempts.

    run_id: drawn at the run's start, so that a rerun of the same job file makes a model with another name.
    base: the fields of the untuned model's Measurement; None until it was made. best: [step, best_metric] of the
    best evaluations so far, the best first. waited: evaluations in a row that were no improvement; stopped_early:
    they were too many. tokens: input tokens trained on. train_seconds: time in training over all attempts.
    skipped_steps: steps in a row up to now whose gradient was too large for FP16. step_records, epoch_records: what one
    step and one epoch take; 0 until it is known.
    """

    run_id: str = field(default_factory=lambda: secrets.token_hex(6))
    base: dict[str, Any] | None = None
    best: list[list[float]] = field(default_factory=list)
    best_metric: str = LOSS
    waited: int = 0
    stopped_early: bool = False
    tokens: int = 0
    train_seconds: float = 0.0
    skipped_steps: int = 0
    step_records: int = 0
    epoch_records: int = 0

    @property
    def best_steps(self) -> list[int]:
        """The best steps, the best first."""
        return [int(step) for step, _ in self.best]

    def save(self, folder: Path) -> None:
        """Write into a checkpoint folder."""
        write_whole(folder / CARRY_FILE, json.dumps(asdict(self), allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> Carry:
        """Read from a checkpoint folder; raises CheckpointInvalid."""
        try:
            return cls(**json.loads((folder / CARRY_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise FinetuneError(
                f"The checkpoint's {CARRY_FILE} cannot be read: {error}", failure_class="CheckpointInvalid"
            ) from error
