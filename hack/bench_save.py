"""What a save costs training: the stall beside saves that training waits for, the slow-down, and saves that are too slow.

Each part runs in a process of its own (bench_save_run). Prints figures and the promises beside them; asserts nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hack.bench_train import model_folder

SLOW_BYTES_PER_SECOND = 5_000_000
PAIRS = 7


def main() -> int:
    """Run the parts and print one line for each figure."""
    with tempfile.TemporaryDirectory(prefix="bench-save-") as folder:
        model = model_folder("135m", Path(folder))
        rate = float(SLOW_BYTES_PER_SECOND)
        for tuning in ("LoRA", "Full"):
            work = Path(folder) / tuning
            found = run("stall", tuning, model, work)
            if tuning == "LoRA":
                rate = uploaded_per_second(work / "at-once")
            show_stall(tuning, found, rate)
        found = run("training", "LoRA", model, Path(folder) / "training")
        show_slow_down(found)
        show_skipped(found)
    return 0


def run(part: str, tuning: str, model: Path, work: Path) -> dict[str, Any]:
    """One part in a process of its own."""
    print(f"running: {part}, {tuning}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "hack.bench_save_run", part, tuning, str(model), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if done.returncode:
        raise SystemExit(f"{part} of {tuning} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def uploaded_per_second(folder: Path) -> float:
    """Bytes per second of an upload of folder to a real S3 server through a proxy that lets 5 MB pass in a second.

    A busy machine is slower than its proxy allows, which would flatter the ratio: then the 5 MB count.
    """
    import boto3

    from tests.chaos.proxy import Proxy
    from tests.cluster.s3 import S3Server

    files = [path for path in folder.rglob("*") if path.is_file()]
    with S3Server() as s3, Proxy(s3.port) as proxy:
        s3.create_bucket("bench")
        client = boto3.client("s3", **{**s3.client_options(), "endpoint_url": proxy.endpoint})
        proxy.rate = SLOW_BYTES_PER_SECOND
        begun = time.perf_counter()
        for path in files:
            client.upload_file(str(path), "bench", path.name)
        seconds = time.perf_counter() - begun
        client.close()
    found = sum(path.stat().st_size for path in files) / seconds
    print(f"the upload ran at {found / 1e6:.2f} MB/s", file=sys.stderr, flush=True)
    return max(found, SLOW_BYTES_PER_SECOND)


def show_stall(tuning: str, found: dict[str, Any], rate: float) -> None:
    """The stall of our save beside the library's own save of the same state, to disk and to a slow S3."""
    ours, synced, plain = (statistics.median(found[name]) for name in ("ours", "synced", "plain"))
    size = found["bytes"]
    print(
        f"135M {tuning}, {size / 1e6:.0f} MB: training waits {ours:.3f} s ({min(found['ours']):.3f} to "
        f"{max(found['ours']):.3f}; the first save {found['first']:.3f} s, its buffers are new)\n"
        f"  beside a save to local disk with fsync {synced:.3f} s: ratio {ours / synced:.3f} (promise: at most 0.30); "
        f"without fsync {plain:.3f} s: {ours / plain:.3f}\n"
        f"  beside an upload at {rate / 1e6:.2f} MB/s {size / rate:.1f} s"
        f"{'' if tuning == 'LoRA' else ' (its size at the rate that was measured above)'}: ratio "
        f"{ours / (size / rate):.4f} (promise: at most 0.01)",
        flush=True,
    )


def show_slow_down(found: dict[str, Any]) -> None:
    """Blocks of steps with one save beside blocks without, in turns."""
    slower = [with_save / without - 1 for with_save, without in zip(found["with"], found["without"], strict=True)]
    block = statistics.median(found["without"])
    shown = ", ".join(f"{value:+.1%}" for value in slower)
    print(
        f"135M LoRA, one save in {found['interval']} steps ({block:.1f} s): training slower by "
        f"{statistics.median(slower):+.2%}, the median of {len(slower)} pairs ({shown}; promise: at most 3%)",
        flush=True,
    )


def show_skipped(found: dict[str, Any]) -> None:
    """Saves that are due at each step and take longer than a step."""
    slow = found["slow"]
    print(
        f"saves due at each of {slow['due']} steps, each written in {slow['seconds']:.1f} s of {slow['steps']:.1f} steps: "
        f"{slow['written']} written, {slow['skipped']} skipped and counted in the last one's marker",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
