"""One part of bench_save: python -m hack.bench_save_run stall|training LoRA|Full MODEL WORK."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from finetune_api.runfile import RunFile
from finetune_trainer.worker.snapshot import Snapshot
from hack.bench_save import PAIRS
from hack.bench_train import WORDS
from tests.train.methods.case import merged
from tests.train.worker.runs import Work, build_engine_in, run_document

ROUNDS = 5
WARM_UP = 2
INTERVAL = 4
SLOW_STEPS = 8
SLOWER_THAN_A_STEP = 2.5
TUNING: dict[str, Any] = {
    "LoRA": {"type": "LoRA", "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0}},
    "Full": {"type": "Full", "lora": None},
}


def engine_of(tuning: str, model: Path, root: Path, steps: int) -> Any:
    """An engine whose records are all of about one length, so that steps cost about the same."""
    draw, words = random.Random(5), list(WORDS) * 8
    rows = [
        {"prompt": " ".join(draw.sample(words, 70)) + ": ", "completion": " ".join(draw.sample(words, 70))}
        for _ in range(512)
    ]
    changes = {
        "dataset": {"validationFraction": None, "truncation": "Tail"},
        "tuning": TUNING[tuning],
        "hyperparameters": {
            "totalSteps": steps,
            "learningRate": 1e-4,
            "microBatchSize": 4,
            "gradientAccumulation": 1,
            "maxSequenceLength": 256,
        },
    }
    work = Work.make(root, RunFile.from_json(merged(run_document(), changes)), model, rows)
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return build_engine_in(str(root))


def stall(tuning: str, model: Path, root: Path) -> dict[str, Any]:
    """Seconds that the training thread waits for our save, and for the library's own of the same state, in turns."""
    engine = engine_of(tuning, model, root, WARM_UP)
    save, first = engine._save_checkpoint, []

    def timed(*arguments: Any) -> None:
        begun = time.perf_counter()
        save(*arguments)
        first.append(time.perf_counter() - begun)

    engine._save_checkpoint = timed
    engine.train()
    found: dict[str, Any] = {"ours": [], "plain": [], "synced": [], "first": first[0]}
    save(engine.model)  # the end of training gave the buffers back
    for _ in range(ROUNDS):
        os.sync()
        begun = time.perf_counter()
        save(engine.model)
        found["ours"].append(time.perf_counter() - begun)
        engine.checkpoints.finish()
        shutil.rmtree(root / "at-once", ignore_errors=True)
        os.sync()
        begun = time.perf_counter()
        save_at_once(engine, root / "at-once")
        found["plain"].append(time.perf_counter() - begun)
        sync(root / "at-once")
        found["synced"].append(time.perf_counter() - begun)
    found["bytes"] = sum(path.stat().st_size for path in (root / "at-once").rglob("*") if path.is_file())
    return found


def save_at_once(engine: Any, folder: Path) -> None:
    """The library's own save."""
    scratch, engine.args.output_dir = engine.args.output_dir, str(folder)
    Trainer._save_checkpoint(engine, engine.model, None)
    engine.args.output_dir = scratch


def sync(folder: Path) -> None:
    """Every file of folder is on the disk itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Blocks(TrainerCallback):
    """Steers when the engine saves, and takes the time of each step. A save after a step is part of the next one."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.ends: list[float] = []
        self.slow_seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Blocks of INTERVAL steps: the first one of each second block follows a save. Then a save at each step."""
        self.ends.append(time.perf_counter())
        block, place = divmod(state.global_step - WARM_UP, INTERVAL)
        if block >= 2 * PAIRS:
            if not self.slow_seconds:
                self.slow_seconds = SLOWER_THAN_A_STEP * statistics.median(self.steps())
            control.should_save = True
            self.engine.save_is_optional = state.global_step < state.max_steps
        elif block >= 0:
            control.should_save = place == 0 and saves(block)

    def steps(self) -> list[float]:
        """Seconds of each step but the first."""
        return [later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)]

    def seconds(self, block: int) -> float:
        """Seconds of a block."""
        first = WARM_UP - 1 + block * INTERVAL
        return self.ends[first + INTERVAL] - self.ends[first]


def saves(block: int) -> bool:
    """Whether a block has a save: of each pair the first or the second, in turns."""
    return block % 2 == (block // 2) % 2


def training(tuning: str, model: Path, root: Path) -> dict[str, Any]:
    """Pairs of blocks with and without a save; then saves that are written more slowly than they are due."""
    engine = engine_of(tuning, model, root, WARM_UP + 2 * PAIRS * INTERVAL + SLOW_STEPS)
    blocks, write = Blocks(engine), Snapshot.write

    def slowly(snapshot: Snapshot) -> None:
        time.sleep(blocks.slow_seconds)
        write(snapshot)

    Snapshot.write = slowly  # type: ignore[method-assign]
    engine.add_callback(blocks)
    engine.train()
    pairs = [sorted((2 * k, 2 * k + 1), key=saves) for k in range(PAIRS)]
    markers = [json.loads(path.read_text()) for path in (root / "checkpoints").glob("*.ready")]
    slow = [marker for marker in markers if marker["step"] >= WARM_UP + 2 * PAIRS * INTERVAL]
    return {
        "interval": INTERVAL,
        "without": [blocks.seconds(without) for without, _ in pairs],
        "with": [blocks.seconds(with_save) for _, with_save in pairs],
        "slow": {
            "due": SLOW_STEPS + 1,
            "seconds": blocks.slow_seconds,
            "steps": SLOWER_THAN_A_STEP,
            "written": len(slow),
            "skipped": max(marker["skipped"] for marker in slow),
        },
    }


if __name__ == "__main__":
    part, tuning, model, work = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(2)
    print(json.dumps((stall if part == "stall" else training)(tuning, model, work)))
