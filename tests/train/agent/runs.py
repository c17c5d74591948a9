"""What tests of the agent start with: a place with model and data, a run file, and the agent as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.documents import TerminationMessage
from finetune_api.runfile import Reference, RunFile, StorageAccess
from finetune_trainer.sources import Purpose, Reach, data_digest, fetch

ROOT = Path(__file__).parents[3]
STAND_IN = "tests.train.agent.stand_in"
UID = "0c9b1e9a-5f6e-4a55-9a3e-3f1c6b7a8d90"
# A ceiling for a machine that is busy with other things: two real workers load torch in this time.
PATIENCE_SECONDS = 240


def write_inputs(folder: Path) -> None:
    """A model folder `base` that the sources accept and a data file `train.jsonl`; the stand-in loads neither."""
    model = folder / "base"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (model / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    data = folder / "train.jsonl"
    data.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')


def run_file(
    model: str,
    data: str,
    output: str,
    *,
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
    nodes: int = 1,
    uid: str = UID,
    profile: str | None = None,
    scratch: Path,
    keep_last: int = 3,
    endpoint: str | None = None,
) -> RunFile:
    """A whole run file with the digests of what is there now."""
    access = {"profile": profile, "endpoint": endpoint, "region": "us-east-1" if endpoint else None}
    reach = Reach(env=dict(environment or {}), allow_file=True)
    source = Reference(uri=model, access=StorageAccess.model_validate(access))
    records = Reference(uri=data, access=StorageAccess.model_validate(access))
    fetched = fetch(source, scratch / "m", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    rows = fetch(records, scratch / "d", purpose=Purpose.DATA, field="dataset.sources[0].uri", reach=reach)
    return RunFile.from_json(
        {
            "job": {"name": "tiny", "namespace": "team-a", "uid": uid},
            "model": {"source": source.to_json(), "task": "CausalLM", "attention": "Sdpa", "digest": fetched.digest},
            "dataset": {
                "sources": [records.to_json()],
                "format": "PromptCompletion",
                "lossOn": "Completion",
                "truncation": "Tail",
                "digest": data_digest([(data, rows.files)]),
            },
            "objective": {"type": "Supervised"},
            "tuning": {"type": "Full"},
            "hyperparameters": {
                "totalSteps": 4,
                "learningRate": 1e-3,
                "schedule": "Constant",
                "warmupRatio": 0.0,
                "weightDecay": 0.0,
                "microBatchSize": 1,
                "gradientAccumulation": 1,
                "maxSequenceLength": 16,
                "precision": "FP32",
                "optimizer": "AdamW",
                "gradientCheckpointing": False,
                "maxGradNorm": 1.0,
                "zeroStage": 0,
                "seed": 1,
            },
            "evaluation": {"generation": {}},
            "checkpoint": {"everySteps": 2, "keepLast": keep_last},
            "output": {"target": {"uri": output, "access": access}, "mergeAdapter": False, "onExisting": "Fail"},
            "resources": {"pool": "cpu", "nodes": nodes, "processesPerNode": processes, "accelerator": "cpu"},
        }
    )


@dataclass
class Agent:
    """The agent as a process. `does` is the stand-in's behaviour."""

    run: RunFile
    folder: Path
    does: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0
    node: int = 0
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    module: str = STAND_IN
    process: subprocess.Popen[bytes] | None = None

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def start(self) -> Agent:
        self.folder.mkdir(parents=True, exist_ok=True)
        run_path = self.folder / "run.json"
        run_path.write_text(json.dumps(self.run.to_json()))
        path = f"{ROOT}:{ROOT / 'api'}:{ROOT / 'trainer-image'}"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": path,
            "STAND_IN": json.dumps(self.does),
            "OMP_NUM_THREADS": "1",
            "FINETUNE_ATTEMPT": str(self.attempt),
            "JOB_COMPLETION_INDEX": str(self.node),
            **self.environment,
        }
        command = [
            *self.launcher,
            sys.executable,
            "-m",
            "finetune_trainer.agent",
            "--run-file",
            str(run_path),
            "--work",
            str(self.work),
            "--termination-log",
            str(self.folder / "termination"),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--master-port",
            "0",
            "--local",
            "--worker-module",
            self.module,
            "--kill-grace",
            "0.3",
            *self.arguments,
        ]
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=self.folder)
        return self

    def finish(self) -> int:
        """The exit code; the process is killed if it takes too long."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the agent did not end:\n{self.out}\n{self.err}") from None

    def execute(self) -> int:
        return self.start().finish()

    def stop(self) -> int:
        """SIGTERM, as the kubelet sends it; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.finish()

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """The condition's first true value; fails if the agent ends before."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (value := condition()):
            assert self.process.poll() is None, f"the agent ended early:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.out}\n{self.err}"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int) -> None:
        self.wait_for(
            lambda: (found := self.read_json(self.work / "state" / "progress.json")) and found["step"] >= step
        )

    def wait_for_event(self, event: str) -> dict[str, Any]:
        found = self.wait_for(lambda: self.events(event))
        return found[0]

    def get(self, path: str) -> bytes:
        port = self.wait_for(lambda: (p := self.work / "state" / "port").exists() and p.read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.read()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def events(self, event: str) -> list[dict[str, Any]]:
        """The agent's log lines of that event."""
        lines = [json.loads(line) for line in self.out.splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("event") == event]

    @property
    def message_bytes(self) -> bytes:
        return (self.folder / "termination").read_bytes()

    @property
    def message(self) -> TerminationMessage:
        return TerminationMessage.from_json(json.loads(self.message_bytes))

    @staticmethod
    def read_json(path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None
