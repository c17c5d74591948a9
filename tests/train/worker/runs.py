"""Runs for the worker's tests: a run file by few words, its work directory, and workers as real processes.

Workers are forked from a server process that has imported the libraries once, so that a run costs seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.runfile import RunFile
from tests.train.models import tiny_model

_PRELOADED = [
    "torch",
    "transformers",
    "transformers.trainer",
    "peft",
    "bitsandbytes",
    "accelerate",
    "matplotlib.figure",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "finetune_trainer.worker.train",
    "finetune_trainer.worker.main",
    "tests.train.models",
]
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(_PRELOADED)
TIMEOUT_SECONDS = 240


def records(count: int = 24) -> list[dict[str, str]]:
    """A task that a tiny model can learn: a letter asks for a word."""
    words = ["red", "blue", "green", "black", "white", "grey"]
    return [
        {"prompt": f"say {words[i % 6]} {i // 6}: ", "completion": words[i % 6] * (1 + i % 3)} for i in range(count)
    ]


def run_document() -> dict[str, Any]:
    """The JSON form of a small LoRA run of four steps on two held-out records and the rest for training."""
    return {
        "job": {"name": "tiny", "namespace": "team-a", "uid": "0f0e0d0c-0000-0000-0000-000000000001"},
        "model": {
            "source": {"uri": "hf://tiny/llama", "revision": "abc123", "access": {}},
            "task": "CausalLM",
            "attention": "Sdpa",
            "digest": "sha256:m",
        },
        "dataset": {
            "sources": [{"uri": "s3://b/train.jsonl", "access": {}}],
            "format": "PromptCompletion",
            "validationFraction": 0.2,
            "lossOn": "Completion",
            "truncation": "Error",
            "digest": "sha256:d",
        },
        "objective": {"type": "Supervised"},
        "tuning": {
            "type": "LoRA",
            "lora": {
                "rank": 4,
                "alpha": 8,
                "dropout": 0.0,
                "targetModules": ["all-linear"],
                "bias": "None",
                "variant": "Standard",
            },
        },
        "hyperparameters": {
            "totalSteps": 4,
            "epochs": None,
            "learningRate": 1e-2,
            "schedule": "Linear",
            "warmupRatio": 0.0,
            "weightDecay": 0.0,
            "microBatchSize": 2,
            "gradientAccumulation": 2,
            "maxSequenceLength": 64,
            "precision": "FP32",
            "optimizer": "AdamW",
            "gradientCheckpointing": False,
            "maxGradNorm": 1.0,
            "zeroStage": 0,
            "seed": 7,
        },
        "evaluation": {"generation": {"maxNewTokens": 8}},
        "checkpoint": {"keepLast": 2},
        "output": {"target": {"uri": "s3://b/out", "access": {}}, "mergeAdapter": False, "onExisting": "Fail"},
        "resources": {"pool": "cpu", "nodes": 1, "processesPerNode": 1, "accelerator": "cpu"},
        "settings": [{"field": "hyperparameters.learningRate", "value": 0.01, "source": "spec"}],
    }


def run_file(**changes: Any) -> RunFile:
    """The run of run_document; changes name fields of any section."""
    document = run_document()
    for key, value in changes.items():
        section, name = _FIELDS[key]
        document[section][name] = value
    return RunFile.from_json(document)


_FIELDS = {
    **{
        name: ("hyperparameters", name)
        for name in (
            "totalSteps",
            "learningRate",
            "schedule",
            "warmupRatio",
            "weightDecay",
            "microBatchSize",
            "gradientAccumulation",
            "maxSequenceLength",
            "precision",
            "optimizer",
            "gradientCheckpointing",
            "maxGradNorm",
            "zeroStage",
            "seed",
        )
    },
    **{name: ("tuning", name) for name in ("type", "lora", "quantization")},
    "processesPerNode": ("resources", "processesPerNode"),
    "evaluateSteps": ("evaluation", "everySteps"),
    "saveSteps": ("checkpoint", "everySteps"),
    "saveMinutes": ("checkpoint", "everyMinutes"),
    "mergeAdapter": ("output", "mergeAdapter"),
    "attention": ("model", "attention"),
    "validationFraction": ("dataset", "validationFraction"),
}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targetModules": ["all-linear"], "bias": "None", "variant": "Standard"}
NF4 = {"bits": 4, "type": "NF4", "doubleQuant": True, "computeType": "BF16"}
FULL: dict[str, Any] = {"type": "Full", "lora": None}
QLORA: dict[str, Any] = {"type": "QLoRA", "quantization": NF4, "precision": "BF16", "optimizer": "PagedAdamW8bit"}


@dataclass
class Work:
    """One work directory, as the agent would prepare it."""

    root: Path
    run: RunFile

    @classmethod
    def make(cls, root: Path, run: RunFile, model: Path, rows: list[dict[str, str]] | None = None) -> Work:
        """Lay out inputs for run."""
        (root / "inputs/data/0").mkdir(parents=True)
        shutil.copytree(model, root / "inputs/model")
        lines = "".join(json.dumps(row) + "\n" for row in rows or records())
        (root / "inputs/data/0/train.jsonl").write_text(lines)
        return cls(root, run)

    def resumed_from(self, earlier: Work, step: int, root: Path) -> Work:
        """A further attempt in root that takes up the checkpoint of step."""
        shutil.copytree(earlier.root / "inputs", root / "inputs")
        shutil.copytree(earlier.root / f"checkpoints/step-{step}", root / "resume")
        return Work(root, self.run)

    def start(self) -> list[Any]:
        """Start all ranks as processes."""
        path = self.root / "run.json"
        path.write_text(json.dumps(self.run.to_json()))
        return start(_worker, self.run.world_size, ["--run-file", str(path), "--work", str(self.root)])

    def train(self) -> list[int]:
        """Run all ranks as processes to their end; returns their exit codes."""
        return finish(self.start())

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 says that it has made step steps."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            path = self.root / "state/progress.json"
            if path.exists() and json.loads(path.read_text())["step"] >= step:
                return
            time.sleep(0.05)
        raise AssertionError(f"step {step} was never reached")

    def read(self, name: str) -> Any:
        """A JSON file below the root."""
        return json.loads((self.root / name).read_text())

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.root / "artifact/metrics.jsonl").read_text().splitlines()]

    def losses(self, folder: str) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of each step in a checkpoint's history."""
        history = self.read(f"{folder}/trainer_state.json")["log_history"]
        return [(e["step"], e["loss"], e["grad_norm"]) for e in history if "loss" in e]

    def logged(self) -> str:
        """What the workers printed."""
        return (self.root / "worker-0.log").read_text()


def _worker(argv: list[str], env: dict[str, str]) -> int:
    from finetune_trainer.worker.main import main

    log = Path(argv[-1]) / f"worker-{env['RANK']}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return main(argv)


def _start(function: Callable[..., Any], arguments: Any, env: dict[str, str]) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    sys.exit(function(arguments, env))


def launch(function: Callable[..., Any], world_size: int, arguments: Any) -> list[int]:
    """Run function(arguments, env) in world_size fresh processes; returns exit codes."""
    return finish(start(function, world_size, arguments))


def start(function: Callable[..., Any], world_size: int, arguments: Any) -> list[Any]:
    """Start function(arguments, env) in world_size fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(world_size):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_PROCESSES.Process(target=_start, args=(function, arguments, own)))
        processes[-1].start()
    return processes


def finish(processes: list[Any]) -> list[int]:
    """Exit codes of processes; one that hangs fails the test."""
    for process in processes:
        process.join(TIMEOUT_SECONDS)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} of {len(processes)} processes hung"
    return [process.exitcode for process in processes]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What function returns in a fresh process that has the libraries; its exception is raised here as text."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    assert ours.poll(TIMEOUT_SECONDS), f"{function.__name__} gave no answer"
    result, trace = ours.recv()
    process.join(TIMEOUT_SECONDS)
    assert trace is None, trace
    return result


def _call(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((function(*arguments), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))


@functools.cache
def made_model(**options: Any) -> Path:
    """A tiny model made in a child, so that the test process itself never imports torch."""
    target = Path(tempfile.mkdtemp(prefix="finetune-worker-tests-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    in_child(_make_model, str(target), options)
    return target


def _make_model(target: str, options: dict[str, Any]) -> None:
    shutil.copytree(tiny_model(**options), target, dirs_exist_ok=True)


def work_for(
    root: Path, *, rows: list[dict[str, str]] | None = None, model: dict[str, Any] | None = None, **changes: Any
) -> Work:
    """A work directory with a tiny model (arguments of tiny_model) and the run that changes describe."""
    return Work.make(root, run_file(**changes), made_model(**(model or {})), rows)


def build_engine_in(root: str) -> Any:
    """In a child: the engine of the work directory at root, ready to train."""
    from finetune_api.runfile import RunFile
    from finetune_trainer.agent.workdir import WorkDir
    from finetune_trainer.data import load_dataset
    from finetune_trainer.worker.heartbeat import Heartbeat
    from finetune_trainer.worker.ranks import Ranks
    from finetune_trainer.worker.tokenizers import prepare_tokenizer
    from finetune_trainer.worker.train import build_engine, supervise

    work = WorkDir(Path(root))
    run = RunFile.from_json(json.loads((work.root / "run.json").read_text()))
    ranks = Ranks.from_environment()
    tokenizer = prepare_tokenizer(run, work)
    supervision = supervise(run, work, ranks, Heartbeat(work.heartbeat(ranks.rank)))
    return build_engine(run, supervision, load_dataset(run, work.inputs, tokenizer), tokenizer)


class _Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.target),)


def plant_pickle(file: str, key: str, target: str) -> None:
    """In a child: write a state file whose key creates target when it is unpickled; shown to work on the way."""
    import torch

    torch.save({key: _Bomb(target)}, file)
    torch.load(file, weights_only=False)
    assert Path(target).exists(), "the bomb works where pickles are loaded"
    Path(target).unlink()
