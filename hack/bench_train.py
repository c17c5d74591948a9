"""Tokens per second and peak memory of our worker's engine beside TRL's SFTTrainer: same model, data, batch and seed.

Both run the same number of optimizer steps in processes of their own, in turns; the first step is not timed. Prints
the median of the rounds' ratios; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROWS = 4096
WORDS = ("red", "blue", "green", "black", "white", "grey", "paris", "rome", "madrid", "answer", "question", "sky")


@dataclass(frozen=True)
class Setting:
    """One comparison. length: longest sequence in tokens. micro: records in a forward pass, accumulation: passes a step.

    packed_passes: in how many passes a packed run, ours and TRL's, takes what an unpacked run takes in one. Packed
    sequences are full where records are mostly short, so that a pass of as many of them needs more memory; the step
    stays the same.
    """

    name: str
    model: str
    length: int
    micro: int
    accumulation: int
    steps: int
    learning_rate: float
    words: int
    packed_passes: int = 1

    def packed(self) -> Setting:
        """This setting as packed runs take it."""
        micro, accumulation = self.micro // self.packed_passes, self.accumulation * self.packed_passes
        return replace(self, micro=micro, accumulation=accumulation)


SETTINGS = {
    "tiny": Setting("tiny", "tiny", 256, 8, 2, 30, 1e-3, 30),
    "135m": Setting("135m", "135m", 256, 8, 1, 3, 1e-4, 90, packed_passes=2),
}


def conversations(words: int, count: int = ROWS) -> list[dict[str, Any]]:
    """Short chats whose lengths are spread as people's are: log-normal, a median of a sixth of the longest.

    words: of the longest question and of the longest answer.
    """
    draw = random.Random(11)  # anybody may repeat it
    rows = []
    for _ in range(count):
        asked, said = (max(2, min(words, round(words / 6 * math.exp(draw.gauss(0, 0.9))))) for _ in range(2))
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=asked))}],
                "completion": [{"role": "assistant", "content": " ".join(draw.choices(WORDS, k=said))}],
            }
        )
    return rows


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(prog="make bench-train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=sorted(SETTINGS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        for name, setting in SETTINGS.items():
            if arguments.only in (None, name):
                compare(setting, model_folder(setting.model, Path(folder)), Path(folder), arguments.rounds)
    return 0


KINDS = ("ours", "trl", "ours-packed", "trl-packed")
BESIDE = (("ours", "trl"), ("ours-packed", "trl"), ("ours-packed", "trl-packed"))


def compare(setting: Setting, model: Path, folder: Path, rounds: int) -> None:
    """Print the ratios of one setting: in each round every kind runs once, and a ratio is taken within a round."""
    found: list[dict[str, dict[str, float]]] = []
    for number in range(1, rounds + 1):
        found.append({kind: measure(kind, setting, model, folder) for kind in KINDS})
        rates = ", ".join(f"{kind} {rate(found[-1][kind]):.0f}" for kind in KINDS)
        print(f"{setting.name}: round {number} of {rounds}, tokens/s: {rates}", file=sys.stderr, flush=True)
    for ours, theirs in BESIDE:
        speed = [rate(one[ours]) / rate(one[theirs]) for one in found]
        memory = [one[ours]["peakMiB"] / one[theirs]["peakMiB"] for one in found]
        rates = [statistics.median(rate(one[kind]) for one in found) for kind in (ours, theirs)]
        print(
            f"{setting.name:<6}{ours:<12} beside {theirs:<11} tokens/s {rates[0]:8.0f} / {rates[1]:8.0f}  "
            f"ratio {statistics.median(speed):.3f} ({min(speed):.3f} to {max(speed):.3f})  "
            f"peak memory {statistics.median(memory):.3f}",
            flush=True,
        )


def rate(run: dict[str, float]) -> float:
    """Tokens per second, padding not counted."""
    return run["tokens"] / run["seconds"]


def measure(kind: str, setting: Setting, model: Path, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "hack.bench_train_run", kind, json.dumps(asdict(setting)), str(model), work]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def model_folder(name: str, folder: Path) -> Path:
    """The tiny model, made in a child so that this process stays light, or the demo's pretrained 135M."""
    if name == "135m":
        from hack.demo.model import base_model

        return base_model(Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache/finetune-operator")))
    target = folder / "tiny"
    code = (
        "import shutil, sys; from tests.train.models import tiny_model; "
        "shutil.copytree(tiny_model('llama', chat_template=True, width=128, layers=4, positions=512), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, capture_output=True)
    return target


class Clock:
    """Tokens and seconds of all steps but the first; a callback for either trainer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._step = 0
        self._started = 0.0

    def count(self, tokens: int) -> None:
        """A micro batch with so many tokens that are no padding."""
        if self._step >= 1:
            self.tokens += tokens

    def step_ended(self) -> None:
        """An optimizer step is done."""
        now = time.perf_counter()
        if self._step == 0:
            self._started = now
        self._step += 1
        self.seconds = now - self._started

    def result(self) -> str:
        """One line of JSON."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return json.dumps({"tokens": self.tokens, "seconds": self.seconds, "peakMiB": peak})


if __name__ == "__main__":
    sys.exit(main())
