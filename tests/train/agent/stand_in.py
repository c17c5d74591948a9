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

from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.heartbeat import Heartbeat


@dataclass(frozen=True)
class Behaviour:
    """steps in all; seconds of each; a checkpoint after each `save_every`; ranks and steps at which things go wrong.

    best_step: the one that every checkpoint from there on names as the best. hang_step: reached by no rank; hang_rank
    is the one at fault, and the others wait for it. meeting: a folder by which the ranks of all nodes keep in step and
    stop together. unseen: they do not see that one of them fails, and wait for it. link_rank: its checkpoints hold a link,
    which no store takes. saveless_rank: it makes none. evaluate_step: after it the worker
    evaluates for evaluate_seconds.
    spike_step: its loss is too high unless the guards' factor is at most spike_factor. most_records: a larger micro batch
    does not fit the GPU of rank fail_rank (-1: of any) from memory_step on. trace_to: a line of JSON for each step that is made.
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
    hang_rank: int = 0
    save_seconds: float = 0.0
    evaluate_step: int = -1
    evaluate_seconds: float = 0.0
    deaf: bool = False
    environment_to: str | None = None
    orphan_seconds: float = 0.0
    meeting: str | None = None
    unseen: bool = False
    link_rank: int = -1
    saveless_rank: int = -1
    last_words: str = ""
    say: str = ""
    spike_step: int = -1
    spike_factor: float = 0.0
    spike_class: str = "LossSpike"
    most_records: int = 1 << 30
    memory_step: int = 1
    trace_to: str | None = None
    best_step: int = -1


class Worker:
    def __init__(self, root: Path, run_file: dict[str, Any], behaviour: Behaviour) -> None:
        self.work = root
        work = WorkDir(root)
        self.does = behaviour
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        resumed = work.resume / "step.json"
        self.step = json.loads(resumed.read_text())["step"] if resumed.exists() else 0
        self.resumed = self.step if resumed.exists() else None
        self.run_file, self.guards = run_file, work.guards()
        self.heartbeat = Heartbeat(work.heartbeat(self.rank), work.times if self.rank == 0 else None)

    def run(self) -> int:
        faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.does.environment_to:
            Path(self.does.environment_to).write_text(json.dumps(dict(os.environ)))
        if self.does.orphan_seconds:
            leave_an_orphan(self.does.orphan_seconds)
        print(self.does.say, file=sys.stderr, flush=True)
        self.report("Loading")
        time.sleep(self.does.load_seconds)
        self.report("Training")
        self.heartbeat.doing(Activity.STEPPING)
        while self.step < self.does.steps:
            self.one_step()
            if self.is_stopped():
                self.save()
                return 100
            if self.step % self.does.save_every == 0:
                self.save()
        self.publish()
        return 0

    def is_stopped(self) -> bool:
        asked = not self.does.deaf and (self.work / "control" / "stop").exists()
        if self.does.meeting is None:
            return asked
        views = [Path(self.does.meeting, f"{self.step}-{rank}") for rank in range(self.world)]
        write(views[self.rank], {"stop": asked})
        while not all(view.exists() for view in views):
            if Path(self.does.meeting, "failed").exists():
                fail(self.work, self.rank, "class:CollectiveFailed", "")
            time.sleep(0.01)
        return any(json.loads(view.read_text())["stop"] for view in views)

    def one_step(self) -> None:
        time.sleep(self.does.step_seconds)
        if self.rank == self.does.fail_rank and self.step + 1 == self.does.fail_step:
            self.be_missed()
            fail(self.work, self.rank, self.does.fail_how, self.does.last_words)
        self.obey_guards()
        if self.step + 1 == self.does.hang_step:
            self.heartbeat.doing(Activity.READING_DATA if self.rank == self.does.hang_rank else Activity.WAITING)
            time.sleep(600)
        self.step += 1
        print(f"step {self.step}")
        self.report("Training")
        if self.step == self.does.evaluate_step:
            with self.heartbeat.during(Activity.EVALUATING):
                time.sleep(self.does.evaluate_seconds)

    def be_missed(self) -> None:
        """The other ranks see that this one ends."""
        if self.does.meeting and not self.does.unseen:
            Path(self.does.meeting, "failed").touch()

    def obey_guards(self) -> None:
        """The step's settings as the guards have them; the end that they cannot prevent."""
        step, planned = self.step + 1, self.run_file["hyperparameters"]
        records, passes = self.guards.split(planned["microBatchSize"], planned["gradientAccumulation"])
        factor = self.guards.learning_rate_factor(step)
        short = records > self.does.most_records and step >= self.does.memory_step
        if short and self.does.fail_rank in (-1, self.rank):
            self.be_missed()
            fail(self.work, self.rank, "class:OutOfGpuMemory", self.does.last_words)
        if step == self.does.spike_step and factor > self.does.spike_factor:
            told = {"onsetStep": step, "reason": self.does.spike_class}
            fail(self.work, self.rank, f"class:{self.does.spike_class}", self.does.last_words, told)
        if self.does.trace_to and self.rank == 0:
            with Path(self.does.trace_to).open("a") as file:
                file.write(json.dumps({"step": step, "factor": factor, "records": records, "passes": passes}) + "\n")

    def report(self, stage: str) -> None:
        self.heartbeat.beat()
        if os.environ["LOCAL_RANK"] == "0":
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
        with self.heartbeat.during(Activity.SAVING):
            time.sleep(self.does.save_seconds)
            self.write_checkpoint()

    def write_checkpoint(self) -> None:
        folder = self.work / "checkpoints" / f"step-{self.step}"
        if self.rank == self.does.saveless_rank:
            return
        if os.environ["LOCAL_RANK"] != "0" or folder.exists() or self.step == self.resumed:
            return
        folder.mkdir()
        (folder / f"rank-{self.rank}.bin").write_text(f"rank {self.rank} after step {self.step}")
        if self.rank == self.does.link_rank:
            (folder / "link").symlink_to(folder)
        best = [self.does.best_step] if 0 < self.does.best_step <= self.step else []
        if self.rank == 0:
            self.write_shared_files(folder, best)
        write(folder.with_suffix(".ready"), {"step": self.step, "metrics": {"evalLoss": 1.0 / self.step}, "best": best})

    def write_shared_files(self, folder: Path, best: list[int]) -> None:
        write(folder / "step.json", {"step": self.step})
        write(folder / "plan.json", {"step": self.step})
        write(folder / "run.json", {"best": [[step, 1.0] for step in best]})
        (folder / "weights.bin").write_bytes(b"w" * self.does.save_bytes)

    def publish(self) -> None:
        self.save()
        self.heartbeat.doing(Activity.PUBLISHING)
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


def fail(work: Path, rank: int, how: str, last_words: str, told: dict[str, Any] | None = None) -> None:
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
                **(told or {}),
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
    parser.add_argument("--run-file", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    given = json.loads(os.environ.get("STAND_IN", "{}"))
    unknown = set(given) - {field.name for field in fields(Behaviour)}
    assert not unknown, f"STAND_IN has unknown settings: {unknown}"
    options = parser.parse_args()
    return Worker(options.work, json.loads(options.run_file.read_text()), Behaviour(**given)).run()


if __name__ == "__main__":
    sys.exit(main())
