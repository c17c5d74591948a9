"""How much host memory this process can still take before the kernel ends it (cgroup v2 and v1)."""

from __future__ import annotations

from pathlib import Path

import psutil

_MOUNT = Path("/sys/fs/cgroup")
# Limit, use, and statistics; v2 first. The page cache counts as used, but gives way.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(mount: Path = _MOUNT) -> int:
    """What the machine has left, or this container, if that is less."""
    machine = int(psutil.virtual_memory().available)
    for limit_name, used_name, statistics, cache in _FILES:
        limit, used = _number(mount / limit_name), _number(mount / used_name)
        if limit is not None and used is not None:
            return max(0, min(machine, limit - used + _cached(mount / statistics, cache)))
    return machine


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
