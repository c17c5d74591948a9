"""From the start of the trainer's process to the first new step: after a resume, beside a fresh start, at tiny size.

Both start the agent with its real worker on a local work folder and a `file://` output, in turns. Prints medians and
their difference (promised: at most 5 s); asserts nothing. The processor time of agent and worker stands beside the
seconds: on a machine that is busy with other things it is the steadier figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from finetune_api.runfile import RunFile
from tests.train.agent.runs import Agent, run_file
from tests.train.models import tiny_model

WORKER = "finetune_trainer.worker"
SAVE_STEPS = 20
PROMISED_SECONDS = 5.0


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="make bench-resume")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
        root = Path(folder)
        run = prepare(root)
        save(root, run)
        fresh, resumed = [], []
        for number in range(rounds):
            fresh.append(seconds_to_step(root, run, resume=False))
            resumed.append(seconds_to_step(root, run, resume=True))
            print(f"round {number + 1}: fresh {told(fresh[-1])}; resumed {told(resumed[-1])}", flush=True)
    medians = [tuple(map(statistics.median, zip(*values, strict=True))) for values in (fresh, resumed)]
    difference = (medians[1][0] - medians[0][0], medians[1][1] - medians[0][1])
    print(f"median: fresh {told(medians[0])}; resumed {told(medians[1])}")
    print(f"difference: {told(difference)}; promised: at most {PROMISED_SECONDS:g} s")
    return 0


def told(times: tuple[float, ...]) -> str:
    """A line's part for one start."""
    return f"{times[0]:.2f} s (processor {times[1]:.2f} s)"


def prepare(root: Path) -> RunFile:
    """A LoRA run on a tiny model that is long enough never to end here; its output is root/output."""
    data = root / "sums.jsonl"
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model("llama").as_uri()
    document = run_file(model, data.as_uri(), (root / "output").as_uri(), scratch=root / "scratch").to_json()
    document["hyperparameters"].update(totalSteps=100_000, maxSequenceLength=64)
    document["dataset"]["promptTemplate"] = "{prompt}{completion}"
    document["checkpoint"] = {"everySteps": 100_000, "keepLast": 1}
    document["tuning"] = {
        "type": "LoRA",
        "lora": {
            "rank": 8,
            "alpha": 16,
            "dropout": 0.05,
            "targetModules": ["all-linear"],
            "bias": "None",
            "variant": "Standard",
        },
    }
    return RunFile.from_json(document)


def save(root: Path, run: RunFile) -> None:
    """An output with a checkpoint is at root/saved."""
    document = run.to_json()
    document["checkpoint"]["everySteps"] = SAVE_STEPS
    agent = Agent(RunFile.from_json(document), root / "first", module=WORKER).start()
    agent.wait_for_event("checkpoint stored")
    end(agent)
    shutil.move(root / "output", root / "saved")


def seconds_to_step(root: Path, run: RunFile, *, resume: bool) -> tuple[float, float]:
    """From the start of the agent to the first step of its own: seconds, and processor seconds."""
    output, folder = root / "output", root / "attempt"
    if resume:
        shutil.copytree(root / "saved", output)
    agent = Agent(run, folder, attempt=int(resume), module=WORKER)
    progress = folder / "work/state/progress.json"
    begin = time.monotonic()
    agent.start().wait_for(
        lambda: (found := agent.read_json(progress)) and found["step"] > found.get("resumedFromStep", 0)
    )
    seconds = time.monotonic() - begin
    assert agent.process is not None
    processor = processor_seconds(agent.process.pid)
    resumed_from = agent.read_json(progress).get("resumedFromStep")
    assert (resumed_from is not None) == resume, f"resumed from step {resumed_from}"
    end(agent)
    shutil.rmtree(output)
    shutil.rmtree(folder)
    return seconds, processor


def processor_seconds(pid: int) -> float:
    """User and system time of a process and all that it has started."""
    process = psutil.Process(pid)
    spent = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(times.user + times.system for times in spent)


def end(agent: Agent) -> None:
    """The agent is gone, and with it its worker, which dies with its parent."""
    assert agent.process is not None
    workers = psutil.Process(agent.process.pid).children(recursive=True)
    agent.process.kill()
    agent.process.wait()
    psutil.wait_procs(workers)


if __name__ == "__main__":
    raise SystemExit(main())
