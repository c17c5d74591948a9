"""Runs for chaos: a small real run on a real S3 server, and its attempts as an operator would start them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from finetune_api.runfile import RunFile
from tests.chaos import journal
from tests.chaos.zygote import SOCKET_VARIABLE, Zygote
from tests.cluster.s3 import S3Server
from tests.train.agent.runs import PATIENCE_SECONDS, Agent, run_file
from tests.train.methods.case import merged
from tests.train.worker.runs import records, run_document

BUCKET = "team-a"
STEPS = 60
SAVE_STEPS = 5
STEP_SECONDS = 0.05
STOP_SECONDS = 30
_KEYS = "FINETUNE_CRED_P0_AWS_{}"


@dataclass
class Cloud:
    """An S3 server with a base model and data in a bucket, and the zygote that workers are forked from.

    steps: of each run.
    """

    server: S3Server
    zygote: Zygote
    folder: Path
    steps: int
    attempts: list[Attempt] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def keys(self) -> dict[str, str]:
        """What the kubelet puts into a pod for the credentials profile p0."""
        return {
            _KEYS.format("ACCESS_KEY_ID"): BUCKET,
            _KEYS.format("SECRET_ACCESS_KEY"): self.server.users[BUCKET],
        }

    def stored(self, run: RunFile) -> Path:
        """The folder that holds the objects of the run's output."""
        return self.server.data / run.output.target.uri.removeprefix("s3://")

    def make_run(self, endpoint: str | None = None) -> RunFile:
        """A LoRA run with dropout, shuffling and evaluations whose output is its own.

        endpoint: where the output is reached, if not at the server itself.
        """
        number = next(self._numbers)
        base = run_file(
            f"s3://{BUCKET}/base",
            f"s3://{BUCKET}/train.jsonl",
            f"s3://{BUCKET}/tuned/{number}",
            environment=self.keys,
            profile="p0",
            endpoint=self.server.endpoint,
            keep_last=2,
            uid=f"0c9b1e9a-5f6e-4a55-9a3e-{number:012d}",
            scratch=self.folder / "scratch" / str(number),
        ).to_json()
        small = run_document()
        document = {
            **base,
            "dataset": merged(
                small["dataset"], {"sources": base["dataset"]["sources"], "digest": base["dataset"]["digest"]}
            ),
            "tuning": merged(small["tuning"], {"lora": {"dropout": 0.1}}),
            "hyperparameters": {**small["hyperparameters"], "totalSteps": self.steps},
            "evaluation": {**small["evaluation"], "everySteps": self.steps // 3},
            "checkpoint": {**base["checkpoint"], "everySteps": SAVE_STEPS},
        }
        access = {"access": {"endpoint": endpoint}} if endpoint else {}
        return RunFile.from_json(merged(document, {"output": {"target": access}}))

    def attempt(self, run: RunFile, number: int, *, plain: bool = False, step_seconds: float = STEP_SECONDS) -> Attempt:
        """The run's attempt of that number as a pod of its own would be: its disk is empty. Not started yet.

        plain: the worker starts from a bare interpreter, as in a pod, and not from the zygote.
        """
        folder = self.folder / "attempts" / str(next(self._numbers))
        agent = Agent(
            run,
            folder,
            attempt=number,
            environment={
                **self.keys,
                SOCKET_VARIABLE: self.zygote.address,
                journal.FILE_VARIABLE: str(folder / "journal.jsonl"),
                journal.STEP_SECONDS_VARIABLE: str(step_seconds),
            },
            launcher=("setsid",),  # a process group of its own, with the agent's number
            module="tests.chaos.worker" if plain else "tests.chaos.relay",
            arguments=("--stop-budget", str(STOP_SECONDS)),
        )
        self.attempts.append(Attempt(agent))
        return self.attempts[-1]

    def end(self) -> None:
        """No agent outlives the place, whatever an assertion said."""
        for attempt in self.attempts:
            if attempt.agent.process is not None and not attempt.ended:
                attempt.kill()

    def outcome(self, run: RunFile) -> Outcome:
        """What the finished run published."""
        stored = self.stored(run)
        lines = [json.loads(line) for line in (stored / "metrics.jsonl").read_text().splitlines()]
        return Outcome(
            [{name: value for name, value in line.items() if name != "tokensPerSecond"} for line in lines],
            (stored / "adapter/adapter_model.safetensors").read_bytes(),
        )


@dataclass(frozen=True)
class Outcome:
    """What must not differ: every step's figures and every evaluation (metrics.jsonl), and the adapter's bytes."""

    metrics: list[dict[str, Any]]
    adapter: bytes


@dataclass(frozen=True)
class Undisturbed:
    """What a run gives that nobody disturbed: the figures of each step, and what it published."""

    steps: dict[int, tuple[float, ...]]
    outcome: Outcome


def undisturbed(place: Cloud, *, plain: bool = False) -> Undisturbed:
    """One run from start to end. plain: as for Cloud.attempt."""
    run = place.make_run()
    attempt = place.attempt(run, 0, plain=plain)
    assert attempt.agent.execute() == 0, attempt.agent.out + attempt.agent.err
    found = Undisturbed(attempt.steps(), place.outcome(run))
    assert list(found.steps) == list(range(1, place.steps + 1))
    attempt.clean()
    return found


@dataclass
class Attempt:
    """One attempt of a run: the agent as a process, and what it and its worker wrote down."""

    agent: Agent

    @property
    def process_id(self) -> int:
        assert self.agent.process is not None
        return self.agent.process.pid

    @property
    def ended(self) -> bool:
        assert self.agent.process is not None
        return self.agent.process.poll() is not None

    def lines(self) -> list[journal.Line]:
        """The worker's journal so far."""
        return journal.read(self.agent.folder / "journal.jsonl")

    def steps(self) -> dict[int, tuple[float, ...]]:
        """The figures of each step that this attempt made."""
        return {line.step: line.figures for line in self.lines() if line.step is not None}

    def stage(self) -> str:
        """The stage that the worker entered last; Starting before it entered one."""
        return next((line.stage for line in reversed(self.lines()) if line.stage), "Starting")

    def begun(self) -> bool:
        """Whether the agent has taken the output over."""
        return bool(self.agent.events("attempt begun"))

    def resumed_from(self) -> int:
        """The step that this attempt went on from; 0 on a fresh start."""
        return self.agent.events("attempt begun")[0]["resumed_from_step"] or 0

    def stored(self) -> list[int]:
        """The steps whose checkpoints this attempt stored, as far as its agent could say."""
        return [event["step"] for event in self.agent.events("checkpoint stored")]

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """True once condition holds, False if the attempt ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.ended:
            if condition():
                return True
            assert time.monotonic() < deadline, f"waited too long:\n{self.agent.out}\n{self.agent.err}"
            time.sleep(0.01)
        return False

    def can_be_stopped(self) -> bool:
        """Whether the agent handles SIGTERM by now; before it, the kernel drops the signal where the agent is PID 1."""
        try:
            status = Path(f"/proc/{self.process_id}/status").read_text()
        except OSError:
            return False
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def kill(self) -> None:
        """SIGKILL to the agent's whole process group, as when its node is lost."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process_id, signal.SIGKILL)
        self.agent.finish()

    def clean(self) -> None:
        """Its disk goes, as a pod's does."""
        shutil.rmtree(self.agent.folder, ignore_errors=True)


@contextlib.contextmanager
def cloud(folder: Path, steps: int = STEPS) -> Iterator[Cloud]:
    """A server with a tiny model and 30 records in it, and a zygote; both end with the block."""
    model = folder / "base"
    with S3Server() as server, Zygote(model) as zygote:
        server.add_user(BUCKET)
        server.create_bucket(BUCKET, owner=BUCKET)
        client = boto3.client("s3", **server.client_options(BUCKET))
        for path in model.iterdir():
            client.upload_file(str(path), BUCKET, f"base/{path.name}")
        rows = "".join(json.dumps(row) + "\n" for row in records(30))
        client.put_object(Bucket=BUCKET, Key="train.jsonl", Body=rows.encode())
        place = Cloud(server, zygote, folder, steps)
        try:
            yield place
        finally:
            place.end()
