"""How one worker is watched and steered: heartbeat, progress, the stop file, when to save."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from finetune_api.guards import GuardState
from finetune_api.runfile import RunCheckpoint
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.carry import Carry
from finetune_trainer.worker.heartbeat import Heartbeat
from finetune_trainer.worker.progress import Progress
from finetune_trainer.worker.ranks import Ranks


@dataclass
class SavePolicy:
    """When a checkpoint is due. Minutes are judged by rank 0's clock alone and then agreed upon."""

    every_steps: int | None
    every_minutes: float | None
    last_saved: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, checkpoint: RunCheckpoint) -> SavePolicy:
        """The policy that the run file plans."""
        return cls(checkpoint.every_steps, checkpoint.every_minutes)

    def minutes_are_up(self) -> bool:
        """Whether everyMinutes have passed since the last save."""
        return self.every_minutes is not None and time.monotonic() - self.last_saved >= self.every_minutes * 60

    def step_is_due(self, step: int) -> bool:
        """Whether everySteps names this step."""
        return self.every_steps is not None and step % self.every_steps == 0


@dataclass
class Supervision:
    """All that the engine needs to know about the world outside the library."""

    work: WorkDir
    ranks: Ranks
    heartbeat: Heartbeat
    progress: Progress
    save_policy: SavePolicy
    carry: Carry
    total_steps: int
    zero_stage: int
    guards: GuardState

    def run_to(self, total_steps: int) -> None:
        """The run has that many steps, now that its data is known."""
        self.total_steps = total_steps
        self.progress.update(total_steps=total_steps)

    def stop_asked(self) -> bool:
        """Whether the agent asks this node to stop."""
        return self.work.stop_file.exists()
