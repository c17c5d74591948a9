"""What a run knows besides weights and the library's own state; it travels in the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.workdir import write_whole

CARRY_FILE = "run.json"


@dataclass
class Carry:
    """Results of the untuned base, and sums over all attempts.

    base_eval_loss: token-weighted loss on the held-out records before training; None without any.
    base_answers: the untuned model's answers to the report's prompts.
    tokens: input tokens trained on. train_seconds: time in training over all attempts.
    """

    base_eval_loss: float | None = None
    base_answers: list[str] = field(default_factory=list)
    base_done: bool = False
    tokens: int = 0
    train_seconds: float = 0.0

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
