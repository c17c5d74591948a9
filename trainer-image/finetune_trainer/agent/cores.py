"""How many cores this container may use: the scheduler's mask, or the cgroup's quota if that is less."""

from __future__ import annotations

import math
import os
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def usable_cores(mount: Path = _MOUNT) -> int:
    """At least 1. Without this, a pod limited to 2 of 96 cores would start 96 threads in each worker."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(mount)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(mount: Path) -> float | None:
    """Cores of the CPU quota, cgroup v2 or v1; None without a limit."""
    found = _words(mount / "cpu.max") or _words(mount / "cpu" / "cpu.cfs_quota_us") + _words(
        mount / "cpu" / "cpu.cfs_period_us"
    )
    if len(found) != 2 or not found[0].isdigit() or not found[1].isdigit() or int(found[1]) == 0:
        return None
    return int(found[0]) / int(found[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
