"""This machine as a pool: its GPUs where nvidia-smi finds some, and its CPU."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from finetune_api.planner import Pool
from finetune_api.pool import GPUPoolSpec

CPU = "cpu"
GPU = "gpu"
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_QUERY_SECONDS = 15
_GIB = 2**30


def local_pools(processes: int, ask: Callable[[], str] | None = None) -> list[Pool]:
    """The pools of this machine. processes: how many the job asks for, which share the memory of a CPU run."""
    host = host_memory_gib()
    pools = [_pool(CPU, "cpu", host / max(1, processes), max(processes, os.cpu_count() or 1), host)]
    gpus = parse_gpus((ask or _ask_nvidia_smi)())
    if gpus:
        # Ranks are equal, so the smallest GPU decides what fits.
        name, memory = min(gpus, key=lambda gpu: gpu[1])
        pools.append(_pool(GPU, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), memory, len(gpus), host))
    return pools


def parse_gpus(listing: str) -> list[tuple[str, float]]:
    """(name, memory in GiB) of each line `name, MiB` of nvidia-smi."""
    found = []
    for line in listing.splitlines():
        name, _, memory = line.rpartition(",")
        if name.strip() and memory.strip().isdigit():
            found.append((name.strip(), int(memory) / 1024))
    return found


def host_memory_gib() -> float:
    """Memory of this machine that is free for use, in GiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / _GIB
    raise OSError("/proc/meminfo has no MemAvailable")


def _ask_nvidia_smi() -> str:
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _pool(name: str, accelerator: str, memory_gib: float, count: int, host_gib: float) -> Pool:
    spec = GPUPoolSpec.from_json(
        {
            "accelerator": accelerator,
            "gpuMemoryGiB": round(memory_gib, 1),
            "gpusPerNode": min(count, 64),
            "maxNodes": 1,
            "resourceName": None if name == CPU else "nvidia.com/gpu",
            "provisioning": "Static",
            "startTimeoutSeconds": 60,
            "perGPU": {"cpu": 1, "memoryGiB": round(host_gib / min(count, 64), 1), "ephemeralStorageGiB": 1},
            "sharedMemoryGiB": 1,
            "terminationGracePeriodSeconds": 30,
            "spot": False,
            "hourlyPriceUSD": 0,
            "peakTflops": 0,
        }
    )
    return Pool(name, spec)
