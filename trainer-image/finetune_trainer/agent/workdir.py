"""The work directory: how agent and workers talk. Local files; JSON appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune_api.base import Tolerant
from finetune_api.documents import Finite
from finetune_api.failures import FinetuneError
from finetune_api.guards import GuardState

_EMPTIED = ("resume", "best", "control", "state", "checkpoints", "artifact")
# A worker writes these; more bytes than this is not one of its documents.
_MAX_JSON_BYTES = 1 << 20


class Result(Tolerant):
    """What was made and how good it is.

    artifact: the folder's name, adapter or model; report where nothing was trained. unmet: what of evaluation.require
    the tuned model fails, in words.
    """

    artifact: Annotated[str, Field(max_length=64)]
    base_eval_loss: Finite | None = None
    eval_loss: Finite | None = None
    unmet: str | None = None


@dataclass(frozen=True)
class ReadyCheckpoint:
    """A complete local checkpoint: its folder, and what its `.ready` marker holds.

    best: the steps with the best evaluations up to this one, where the run keeps them; the best first.
    skipped: saves that the workers had left out up to this one.
    """

    step: int
    folder: Path
    marker: Path
    metrics: dict[str, Any]
    best: tuple[int, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class WorkDir:
    """The paths of one attempt on this node."""

    root: Path

    @property
    def inputs(self) -> Path:
        """Base model and data, as the workers read them."""
        return self.root / "inputs"

    @property
    def fetched_file(self) -> Path:
        """Says which inputs are complete below `inputs`."""
        return self.root / "fetched.json"

    @property
    def resume(self) -> Path:
        """The restored checkpoint; absent on a fresh start."""
        return self.root / "resume"

    @property
    def best(self) -> Path:
        """Weights of the step with the best evaluation; absent where none is asked for, or it is the resumed one."""
        return self.root / "best"

    @property
    def stop_file(self) -> Path:
        """Exists: the workers save at the next step boundary and exit."""
        return self.root / "control" / "stop"

    @property
    def state(self) -> Path:
        """What the workers say about themselves."""
        return self.root / "state"

    @property
    def checkpoints(self) -> Path:
        """Local checkpoints and their markers."""
        return self.root / "checkpoints"

    @property
    def artifact(self) -> Path:
        """What is published at the end."""
        return self.root / "artifact"

    @property
    def guards_file(self) -> Path:
        """What the guards have changed so far; absent where nothing."""
        return self.root / "guards.json"

    def guards(self) -> GuardState:
        """What the guards have changed so far. Raises Internal for a file that says nothing."""
        if not self.guards_file.exists():
            return GuardState()
        try:
            return GuardState.from_json(read_json(self.guards_file))
        except ValidationError as error:
            raise FinetuneError(f"{self.guards_file.name} cannot be read: {error}") from error

    def prepare(self) -> None:
        """Empty of everything that an earlier attempt left, but its inputs; the store is the truth about checkpoints."""
        for name in _EMPTIED:
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "artifact.ready").unlink(missing_ok=True)
        for folder in (self.stop_file.parent, self.state, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def heartbeat(self, rank: int) -> Path:
        """The file whose modification time is rank's last sign of life."""
        return self.state / f"heartbeat-{rank}"

    @property
    def times(self) -> Path:
        """The clock of phases that the node's first rank keeps."""
        return self.state / "times.json"

    def error(self, rank: int) -> dict[str, Any] | None:
        """What rank wrote about its own failure, if it did."""
        return read_json(self.state / f"error-{rank}.json")

    def progress(self) -> dict[str, Any] | None:
        """The worker's progress document, if there is one yet."""
        return read_json(self.state / "progress.json")

    def result(self) -> Result | None:
        """What rank 0 wrote at its successful end, if it did and it is valid."""
        try:
            return Result.from_json(read_json(self.state / "result.json"))
        except ValidationError:
            return None

    def artifact_is_ready(self) -> bool:
        """Whether the artifact is complete."""
        return (self.root / "artifact.ready").exists()

    def ready_checkpoints(self) -> list[ReadyCheckpoint]:
        """The complete local checkpoints in ascending order of their steps."""
        found = []
        for marker in self.checkpoints.glob("step-*.ready"):
            number = marker.stem.removeprefix("step-")
            content = read_json(marker)
            if number.isdigit() and content is not None:
                found.append(_ready(int(number), marker, content))
        return sorted(found, key=lambda checkpoint: checkpoint.step)


def _ready(step: int, marker: Path, content: dict[str, Any]) -> ReadyCheckpoint:
    metrics, best, skipped = content.get("metrics"), content.get("best"), content.get("skipped")
    return ReadyCheckpoint(
        step,
        marker.with_suffix(""),
        marker,
        metrics if isinstance(metrics, dict) else {},
        tuple(number for number in best if isinstance(number, int)) if isinstance(best, list) else (),
        skipped if isinstance(skipped, int) else 0,
    )


def delete_checkpoint(checkpoint: ReadyCheckpoint) -> None:
    """It is gone from the local disk. The marker goes first: a folder without one does not count."""
    checkpoint.marker.unlink(missing_ok=True)
    shutil.rmtree(checkpoint.folder, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in path; None if there is none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_whole(path: Path, text: str) -> None:
    """The file has the old text or the new text at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
