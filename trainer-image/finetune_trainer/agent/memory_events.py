"""How often the kernel killed a process of this container for memory (cgroup v2 and v1)."""

from __future__ import annotations

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def find_counter(own: Path = Path("/proc/self/cgroup"), mount: Path = _MOUNT) -> Path | None:
    """The file that counts out-of-memory kills of this process's cgroup; None where there is none."""
    candidates = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if "memory" in controllers.split(","):
            candidates.append(mount / "memory" / relative / "memory.oom_control")
        elif not controllers:
            candidates.append(mount / relative / "memory.events")
    # In a container the path may be the host's, while only the container's own cgroup is mounted.
    candidates += [mount / "memory.events", mount / "memory" / "memory.oom_control"]
    return next((path for path in candidates if path.is_file()), None)


def count_kills(counter: Path | None) -> int:
    """The counter's `oom_kill` value; 0 where it cannot be read."""
    if counter is None:
        return 0
    try:
        lines = counter.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
