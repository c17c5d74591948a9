"""What a worker did, step by step, in a file that outlives a SIGKILL. Light: imports no torch.

The worker's own progress is written once a second, which is too coarse to count lost steps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_VARIABLE = "CHAOS_JOURNAL"
STEP_SECONDS_VARIABLE = "CHAOS_STEP_SECONDS"


@dataclass(frozen=True)
class Line:
    """One entry: a stage that began, or a step that was made with its figures. time: monotonic, of this machine."""

    time: float
    stage: str | None = None
    step: int | None = None
    figures: tuple[float, ...] = ()
    """Loss, gradient norm and learning rate of the step, every bit of them."""


def install(environment: Mapping[str, str]) -> None:
    """From now on this process' worker writes its stages and steps to the journal that environment names.

    Each step takes CHAOS_STEP_SECONDS longer, asleep: so a tiny model's step lasts long enough to be hit, and costs
    the machine nothing.
    """
    from finetune_trainer.worker.progress import Progress

    descriptor = os.open(environment[FILE_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pause = float(environment.get(STEP_SECONDS_VARIABLE, "0"))
    plain_stage, plain_update = Progress.stage, Progress.update

    def write(**entry: Any) -> None:
        os.write(descriptor, json.dumps({"time": time.monotonic(), **entry}).encode() + b"\n")

    def stage(self: Progress, value: Any) -> None:
        plain_stage(self, value)
        write(stage=value.value)

    def update(self: Progress, **fields: Any) -> None:
        plain_update(self, **fields)
        if "step" in fields:
            write(step=fields["step"], figures=[fields["loss"], fields["grad_norm"], fields["learning_rate"]])
            time.sleep(pause)

    Progress.stage, Progress.update = stage, update  # type: ignore[method-assign]


def read(path: Path) -> list[Line]:
    """The entries so far; none if there is no journal yet."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    whole, _, _ = text.rpartition("\n")
    entries = [json.loads(line) for line in whole.splitlines()]
    return [Line(e["time"], e.get("stage"), e.get("step"), tuple(e.get("figures", ()))) for e in entries]
