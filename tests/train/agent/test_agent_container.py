"""What the agent reads about its container: out-of-memory kills and cores, under cgroup v2 and v1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_trainer.agent.cores import usable_cores
from finetune_trainer.agent.memory_events import count_kills, find_counter

ALL = len(os.sched_getaffinity(0))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ({"cpu.max": "9900000 100000"}, min(ALL, 99)),
        ({}, ALL),
    ],
)
def test_a_cpu_limit_bounds_the_threads(tmp_path, files, cores) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("own", "counter"),
    [
        ("0::/kubepods/pod1/trainer\n", "kubepods/pod1/trainer/memory.events"),
        ("0::/\n", "memory.events"),
        ("0::/not/mounted/here\n", "memory.events"),
        ("4:memory:/kubepods/a\n0::/\n", "memory/kubepods/a/memory.oom_control"),
        ("4:memory:/not/mounted/here\n", "memory/memory.oom_control"),
    ],
)
def test_the_counter_of_the_own_cgroup_is_found(tmp_path, own, counter) -> None:
    expected = write(tmp_path / "mount" / counter, "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert find_counter(write(tmp_path / "cgroup", own), tmp_path / "mount") == expected
    assert count_kills(expected) == 3


def test_without_a_counter_there_were_no_kills(tmp_path) -> None:
    assert find_counter(tmp_path / "missing", tmp_path) is None
    assert count_kills(None) == count_kills(tmp_path / "missing") == 0
