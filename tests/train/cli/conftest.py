"""A tiny model and data on this machine, and the `finetune` command as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.s3 import S3Server
from tests.train.models import tiny_model

ROOT = Path(__file__).parents[3]
STAND_IN = ("--worker-module", "tests.train.agent.stand_in")
PATIENCE_SECONDS = 240


@dataclass
class Command:
    """One `finetune` command. `does` is the stand-in's behaviour; None takes the real worker."""

    arguments: tuple[str, ...]
    folder: Path
    does: dict[str, Any] | None = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    out: str = ""
    err: str = ""

    def start(self) -> Command:
        path = f"{ROOT}:{ROOT / 'api'}:{ROOT / 'trainer-image'}"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "STAND_IN": json.dumps(self.does or {}),
            **self.environment,
        }
        arguments = self.arguments
        if self.does is not None and arguments[0] == "run":
            arguments = (*arguments, *STAND_IN)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.cli", *arguments],
            env=environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return self

    def finish(self) -> int:
        assert self.process is not None
        try:
            self.out, self.err = self.process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.out, self.err = self.process.communicate()
            raise AssertionError(f"finetune did not end:\n{self.out}\n{self.err}") from None
        return self.process.returncode

    def execute(self) -> int:
        return self.start().finish()

    def press_ctrl_c(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)

    def wait_for_step(self, work: Path, step: int) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if json.loads((work / "work" / "state" / "progress.json").read_text())["step"] >= step:
                    return
            except (OSError, ValueError):
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"step {step} was not reached:\n{self.process.communicate()}")
            time.sleep(0.05)


@pytest.fixture
def finetune(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Commands that end with the test, whatever happens."""
    made: list[Command] = []

    def make(*arguments: str, **settings: Any) -> Command:
        made.append(Command(arguments, tmp_path, **settings))
        return made[-1]

    yield make
    for command in made:
        if command.process is not None and command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Writes job.yaml for the tiny model and 40 records below the test's folder."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    records = [{"prompt": f"What is {n} plus {n}?", "completion": f" {2 * n}"} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def write(more: str = "", *, output: str = "", steps: int = 4, model: str = "", data: str = "") -> Path:
        text = f"""\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: sums, namespace: team-a}}
spec:
  model: {{uri: {model or (tmp_path / "model").as_uri()}}}
  dataset:
    sources:
    - {{uri: {data or (tmp_path / "train.jsonl").as_uri()}}}
    promptTemplate: "Q: {{prompt}} A:{{completion}}"
  tuning: {{type: LoRA}}
  hyperparameters: {{maxSteps: {steps}, learningRate: 0.01, globalBatchSize: 4}}
  checkpoint: {{everySteps: 1000}}
  output: {{uri: {output or (tmp_path / "out").as_uri()}}}
{more}"""
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_user("team-a")
        server.create_bucket("team-a", owner="team-a")
        yield server
