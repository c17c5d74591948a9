"""This machine as pools, and how progress reads."""

from __future__ import annotations

import pytest

from finetune_api.documents import ProgressDocument
from finetune_trainer.cli.machine import host_memory_gib, local_pools, parse_gpus
from finetune_trainer.cli.progress import describe, duration


def test_the_gpus_of_this_machine_are_a_pool_as_large_as_the_smallest() -> None:
    cpu, gpu = local_pools(1, ask=lambda: "NVIDIA A40, 46068\nNVIDIA L4, 23034\n")
    assert (gpu.name, gpu.spec.accelerator, gpu.spec.gpus_per_node) == ("gpu", "nvidia-l4", 2)
    assert gpu.spec.gpu_memory_gib == pytest.approx(22.5, abs=0.05)
    assert (cpu.name, cpu.on_cpu) == ("cpu", True)


def test_without_gpus_there_is_the_cpu_alone_and_processes_share_its_memory() -> None:
    (one,) = local_pools(1, ask=lambda: "")
    (four,) = local_pools(4, ask=lambda: "")
    assert four.spec.gpu_memory_gib == pytest.approx(one.spec.gpu_memory_gib / 4, rel=0.2)
    assert four.spec.gpus_per_node >= 4
    assert one.spec.gpu_memory_gib == pytest.approx(host_memory_gib(), rel=0.2)


@pytest.mark.parametrize("listing", ["", "No devices were found\n", "[N/A], [N/A]\n"])
def test_an_answer_without_gpus_is_none(listing) -> None:
    assert parse_gpus(listing) == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (45, "45s"), (124, "2m04s"), (11_220, "3h07m")])
def test_a_duration_reads_well(seconds, text) -> None:
    assert duration(seconds) == text


def test_progress_shows_only_what_is_known() -> None:
    known = {"attempt": 0, "stage": "Training", "step": 1, "totalSteps": 2}
    assert describe(ProgressDocument.from_json(known)) == ""
    more = {**known, "loss": 1.23456, "evalLoss": 2.0, "tokensPerSecond": 12345.6, "etaSeconds": 61}
    assert describe(ProgressDocument.from_json(more)) == "loss 1.235  eval loss 2.000  12,346 tokens/s  ETA 1m01s"
