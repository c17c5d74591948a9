"""A worker without torch that keeps the work directory's protocol, for tests of the agent.

`STAND_IN` in the environment holds JSON that says what it shall do; see `Behaviour`. The "model" is the step number,
so a test can tell from a checkpoint or artifact where it came from.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """steps in all; seconds of each; a checkpoint after each `save_every`; ranks and steps at which things go wrong.

    best_step: the one that every checkpoint from there on names as the best.
    """

    steps: int = 4
    step_seconds: float = 0.05
    save_every: int = 2
    save_bytes: int = 1000
    load_seconds: float = 0.0
    fail_rank: int = -1
    fail_step: int = 1
    fail_how: str = "class:DataInvalid"
    hang_step: int = -1
    deaf: bool = False
    environment_to: str | None = None
    orphan_seconds: float = 0.0
    last_words: str = ""
    best_step: int = -1


class Worker:
    def __init__(self, work: Path, behaviour: Behaviour) -> None:
        self.work = work
        self.does = behaviour
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        resumed = work / "resume" / "step.json"
        self.step = json.loads(resumed.read_text())["step"] if resumed.exists() else 0
        self.resumed = self.step if resumed.exists() else None

    def run(self) -> int:
        faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.does.environment_to:
            Path(self.does.environment_to).write_text(json.dumps(dict(os.environ)))
        if self.does.orphan_seconds:
            leave_an_orphan(self.does.orphan_seconds)
        self.report("Loading")
        time.sleep(self.does.load_seconds)
        while self.step < self.does.steps:
            self.one_step()
            if not self.does.deaf and (self.work / "control" / "stop").exists():
                self.save()
                return 100
            if self.step % self.does.save_every == 0:
                self.save()
        self.publish()
        return 0

    def one_step(self) -> None:
        time.sleep(self.does.step_seconds)
        if self.rank == self.does.fail_rank and self.step + 1 == self.does.fail_step:
            fail(self.work, self.rank, self.does.fail_how, self.does.last_words)
        if self.step + 1 == self.does.hang_step:
            time.sleep(600)
        self.step += 1
        print(f"step {self.step}")
        self.report("Training")

    def report(self, stage: str) -> None:
        (self.work / "state" / f"heartbeat-{self.rank}").touch()
        if self.rank == 0:
            write(
                self.work / "state" / "progress.json",
                {
                    "stage": stage,
                    "step": self.step,
                    "totalSteps": self.does.steps,
                    "loss": 2.0 / (self.step + 1),
                    "tokensPerSecond": 1234.5,
                    "etaSeconds": self.does.steps - self.step,
                },
            )

    def save(self) -> None:
        folder = self.work / "checkpoints" / f"step-{self.step}"
        if self.rank != 0 or folder.exists() or self.step == self.resumed:
            return
        folder.mkdir()
        best = [self.does.best_step] if 0 < self.does.best_step <= self.step else []
        write(folder / "step.json", {"step": self.step})
        write(folder / "plan.json", {"step": self.step})
        write(folder / "run.json", {"best": [[step, 1.0] for step in best]})
        (folder / "weights.bin").write_bytes(b"w" * self.does.save_bytes)
        write(folder.with_suffix(".ready"), {"step": self.step, "metrics": {"evalLoss": 1.0 / self.step}, "best": best})

    def publish(self) -> None:
        self.save()
        if self.rank != 0:
            return
        folder = self.work / "artifact" / "adapter"
        folder.mkdir(parents=True)
        write(folder / "adapter.json", {"step": self.step, "resumedFrom": self.resumed})
        (folder.parent / "report.md").write_text("# Report\n")
        write(
            self.work / "state" / "result.json",
            {"artifact": "adapter", "baseEvalLoss": 3.5, "evalLoss": 2.5, "step": self.step},
        )
        (self.work / "artifact.ready").touch()


def leave_an_orphan(seconds: float) -> None:
    """A grandchild whose parent is gone, as a crashed data loader leaves behind."""
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    os.waitpid(child, 0)


def fail(work: Path, rank: int, how: str, last_words: str) -> None:
    """End this process as `how` says: class:NAME, code:N, signal:N, full (ENOSPC), eat (all memory)."""
    kind, _, value = how.partition(":")
    print(last_words, file=sys.stderr, flush=True)
    if kind == "class":
        write(
            work / "state" / f"error-{rank}.json",
            {
                "class": value,
                "message": f"rank {rank} met {value} {last_words}",
                "field": "spec.dataset.sources[0].uri",
                "traceback": "Traceback ...",
            },
        )
        sys.exit(65)
    if kind == "signal":
        os.kill(os.getpid(), int(value))
        time.sleep(10)
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "eat":
        hoard = []
        while True:
            hoard.append(b"x" * (1 << 20))
    sys.exit(int(value))


def write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + f".{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-file", required=True)
    parser.add_argument("--work", required=True, type=Path)
    given = json.loads(os.environ.get("STAND_IN", "{}"))
    unknown = set(given) - {field.name for field in fields(Behaviour)}
    assert not unknown, f"STAND_IN has unknown settings: {unknown}"
    return Worker(parser.parse_args().work, Behaviour(**given)).run()


if __name__ == "__main__":
    sys.exit(main())
