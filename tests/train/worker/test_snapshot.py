"""Saves that training does not wait for: what is written is the state of one step, whole, or nothing that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.cases_reinforcement import CASES as REINFORCEMENT
from tests.train.methods.cases_tuning import CASES as TUNING
from tests.train.worker.runs import FULL, LORA, QLORA, Work, build_engine_in, in_child, launch, work_for

WIDE = {"width": 64}


def written(work: Work) -> str:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return str(work.root)


def ready(work: Work) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in (work.root / "checkpoints").glob("*.ready"))


def lora(root: Path) -> Work:
    return work_for(root, model=WIDE, lora={**LORA, "dropout": 0.2}, saveSteps=2, evaluateSteps=2)


def full(root: Path) -> Work:
    return work_for(root, model={**WIDE, "tied": True}, saveSteps=2, **FULL)


def qlora(root: Path) -> Work:
    """Rank 64 gives tensors large enough for optimizer states of 8 bits."""
    return work_for(root, model=WIDE, saveSteps=2, **{**QLORA, "lora": {**LORA, "rank": 64}})


def prompt_tuning(root: Path) -> Work:
    case = next(case for case in TUNING if case.name == "tuning-ptuning")
    return case.work(root, {"checkpoint": {"everySteps": 2}, "hyperparameters": {"totalSteps": 4}})


def ppo(root: Path) -> Work:
    """Two steps train on each set of completions: the checkpoint of step 3 lies between them."""
    case = next(case for case in REINFORCEMENT if case.name == "ppo-lora")
    return case.work(root, {"checkpoint": {"everySteps": 3}, "hyperparameters": {"totalSteps": 5}})


@pytest.mark.parametrize("method", [lora, full, qlora, prompt_tuning, ppo])
def test_what_is_written_later_equals_a_save_that_training_waits_for(tmp_path: Path, method: Any) -> None:
    """The library saves the same steps to another folder; the first of ours is written when training has changed it all."""
    step, names, differences = in_child(_both_ways, written(method(tmp_path / "w")))
    assert step in (2, 3)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "plan.json", "run.json"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert ("trained.safetensors" in names) == (method is prompt_tuning)
    assert ({"completions-0.safetensors", "value_head.safetensors"} <= names) == (method is ppo)
    assert differences == []


def _both_ways(root: str) -> tuple[int, set[str], list[str]]:
    """The first saved step, its files, and what differs from the library's saves of that step and of the last one."""
    import threading

    from safetensors.torch import save_file
    from transformers import Trainer

    from finetune_trainer.worker.snapshot import Snapshot
    from finetune_trainer.worker.tuning.prompts import needs_own_state, own_state

    engine = build_engine_in(root)
    steps: list[int] = []
    trained = threading.Event()
    save, write = engine._save_checkpoint, Snapshot.write

    def both(model: Any, trial: Any = None) -> None:
        scratch, engine.args.output_dir = engine.args.output_dir, f"{root}/at-once"
        Trainer._save_checkpoint(engine, model, trial)
        engine.args.output_dir = scratch
        folder = Path(root) / f"at-once/checkpoint-{engine.state.global_step}"
        files = dict(engine.objective.own_state())
        if needs_own_state(engine.model):
            files["trained.safetensors"] = own_state(engine.model)
        for name, tensors in files.items():
            save_file(tensors, folder / name)
        if steps:
            trained.set()
        steps.append(engine.state.global_step)
        save(model, trial)

    def write_after_training(snapshot: Snapshot) -> None:
        folder = snapshot.files[0].path.parent
        early = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".pth")]
        assert not early, f"written while training waited: {early}"
        assert trained.wait(100)
        write(snapshot)

    engine._save_checkpoint = both
    Snapshot.write = write_after_training  # type: ignore[method-assign]
    engine.train()
    assert len(steps) == 2, "training went on while the first checkpoint was not written"
    ours = [Path(root) / f"checkpoints/step-{step}" for step in steps]
    theirs = [Path(root) / f"at-once/checkpoint-{step}" for step in steps]
    assert _differences(ours[1], theirs[0]), "the two steps differ"
    names = {str(path.relative_to(ours[0])) for path in ours[0].rglob("*") if path.is_file()}
    return steps[0], names, _differences(ours[0], theirs[0]) + _differences(ours[1], theirs[1])


def _differences(ours: Path, theirs: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    names = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
    found = sorted(names[0] ^ (names[1] - {"training_args.bin", "README.md"} | {"plan.json", "run.json"}))
    for name in sorted(names[0] & names[1]):
        mine, other = ours / name, theirs / name
        if name.endswith(".safetensors"):
            same = mine.read_bytes() == other.read_bytes()
            assert load_file(mine), "there are tensors in it"
        elif name.endswith((".pt", ".pth")):
            same = _equal(*(torch.load(path, weights_only=name != "rng_state.pth") for path in (mine, other)))
        else:
            same = mine.read_bytes() == other.read_bytes()
        found += [] if same else [name]
    return found


def _equal(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


def test_a_save_that_is_due_during_another_is_skipped_and_counted_but_never_the_last(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", totalSteps=5, saveSteps=1)
    assert in_child(_with_a_slow_first_write, written(work)) == [1, 5]
    assert ready(work) == [1, 5]
    assert work.read("checkpoints/step-1.ready")["skipped"] == 0
    assert work.read("checkpoints/step-5.ready")["skipped"] == 3


def _with_a_slow_first_write(root: str) -> list[int]:
    """The steps in the order in which they were written; the first write takes until three saves were left out."""
    import time

    from finetune_trainer.worker.snapshot import Snapshot

    engine, order, write = build_engine_in(root), [], Snapshot.write

    def slow(snapshot: Snapshot) -> None:
        order.append(int(snapshot.files[0].path.parent.name.rpartition("-")[2]))
        while engine.checkpoints.skipped < 3:
            time.sleep(0.01)
        write(snapshot)

    Snapshot.write = slow  # type: ignore[method-assign]
    engine.train()
    assert not engine.checkpoints.is_writing()
    return order


def test_the_best_step_is_saved_and_kept_however_slow_writing_is(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", totalSteps=8, saveSteps=1, evaluateSteps=1)
    document = work.run.to_json()
    document["checkpoint"]["keepBest"] = 1
    work = Work(work.root, type(work.run).from_json(document))
    best = in_child(_with_slow_writes, written(work))
    assert len(best) > 1
    assert set(best) <= set(ready(work)), "each step that was the best one so far"
    kept = (work.root / "best/adapter_model.safetensors").read_bytes()
    assert kept == (work.root / f"checkpoints/step-{best[-1]}/adapter_model.safetensors").read_bytes()


def _with_slow_writes(root: str) -> list[int]:
    import time

    from finetune_trainer.worker.snapshot import Snapshot

    engine, best, write = build_engine_in(root), [], Snapshot.write

    def slow(snapshot: Snapshot) -> None:
        found = engine.supervision.carry.best_steps[0]
        best.extend([found] if found not in best else [])
        time.sleep(0.2)
        write(snapshot)

    Snapshot.write = slow  # type: ignore[method-assign]
    engine.train()
    return best


def test_a_full_disk_ends_the_run_at_the_next_step_and_leaves_nothing_that_counts(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", totalSteps=50, saveSteps=1)
    failure_class, message, step = in_child(_with_a_full_disk, written(work))
    assert failure_class == "DiskFull"
    assert "No space left on device" in message
    assert message.endswith("checkpoint-1/optimizer.pt'"), "the file is named"
    assert step < 50
    assert ready(work) == []
    assert not list((work.root / "checkpoints").glob("step-*"))


def _with_a_full_disk(root: str) -> tuple[str, str, int]:
    from finetune_trainer.worker.faults import classify

    engine = build_engine_in(root)
    partial = Path(engine.args.output_dir) / "checkpoint-1"
    partial.mkdir(parents=True)
    (partial / "optimizer.pt").symlink_to("/dev/full")
    try:
        engine.train()
    except Exception as error:
        fault = classify(error)
        return fault.failure_class, fault.message, engine.state.global_step
    raise AssertionError("the disk was full")


def test_a_full_disk_is_known_by_what_safetensors_says_of_it() -> None:
    """The library replaces a file whole, so that no device can stand in for it: the words are those of its 0.8.0."""
    assert in_child(_words_of_safetensors) == "DiskFull"


def _words_of_safetensors() -> str:
    from safetensors import SafetensorError

    from finetune_trainer.worker.faults import classify
    from finetune_trainer.worker.snapshot import Snapshot

    def fail(content: Any, path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    taken = Snapshot()
    with taken.taking():
        taken._hold(Path("x.safetensors"), {}, fail)
    try:
        taken.write()
    except OSError as error:
        return classify(error).failure_class
    return "written"


def test_a_checkpoint_of_which_one_rank_died_never_counts(tmp_path: Path) -> None:
    work = work_for(tmp_path / "w", totalSteps=500, saveSteps=2, processesPerNode=2)
    codes = launch(_die_in_the_second_write, 2, written(work))
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert ready(work) == [2]
    assert not (work.root / "checkpoints/step-4").exists()
    names = {path.name for path in (work.root / "checkpoints/step-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= names


def _die_in_the_second_write(root: str, env: dict[str, str]) -> int:
    import os

    from finetune_trainer.worker import checkpoints
    from finetune_trainer.worker.main import main
    from finetune_trainer.worker.snapshot import Snapshot

    write, checkpoints._PATIENCE_SECONDS = Snapshot.write, 0.5

    def dying(snapshot: Snapshot) -> None:
        if env["RANK"] == "1" and snapshot.files[0].path.parent.name != "checkpoint-2":
            os._exit(9)
        write(snapshot)

    Snapshot.write = dying  # type: ignore[method-assign]
    return main(["--run-file", f"{root}/run.json", "--work", root])


def test_buffers_serve_again_and_what_does_not_fit_is_written_at_once(tmp_path: Path) -> None:
    assert in_child(_two_snapshots, str(tmp_path)) == {
        "same memory": True,
        "first": [1.0, 2.0],
        "second": [3.0, 4.0],
        "written before the end": [False, False, True],
        "third": [5.0, 6.0],
    }


def _two_snapshots(root: str) -> dict[str, Any]:
    import torch

    from finetune_trainer.worker import snapshot as module

    weights, taken = torch.tensor([1.0, 2.0]), module.Snapshot()
    found, places, early = [], [], []
    for number in range(3):
        path = Path(root) / f"{number}.pt"
        if number == 2:
            module.available_bytes = lambda: 0
            weights = torch.cat([weights, weights])[:2]
            taken = module.Snapshot()
        with taken.taking():
            torch.save({"weights": weights}, path)
            early.append(path.exists())
        places += [file.content["weights"].data_ptr() for file in taken.files]
        weights += 2
        taken.write()
        found.append(torch.load(path, weights_only=True)["weights"].tolist())
    return {
        "same memory": places[0] == places[1],
        "first": found[0],
        "second": found[1],
        "written before the end": early,
        "third": found[2],
    }


def test_pinned_memory_is_counted_by_the_next_power_of_two() -> None:
    """As torch's host allocator takes it. None of a file is held twice, and buffers of other shapes are of no use."""
    assert in_child(_counted) == {
        "bytes on a GPU": [0, 1, 1024, 2048, 4096],
        "bytes on the host": [0, 1, 1024, 1025, 4095],
        "held with 8 MiB free": [False, True, True, False],
        "held with 6 MiB free": [False, False, True, False],
    }


def _counted() -> dict[str, Any]:
    import torch

    from finetune_trainer.worker import snapshot as module

    class OnGpu(torch.Tensor):
        is_cuda = True

    def held(content: Any, free: int) -> bool:
        module.available_bytes = lambda: free
        taken = module.Snapshot()
        with taken.taking():
            taken._hold(Path("x"), other, lambda content, path: None)
        with taken.taking():
            taken._hold(Path("x"), content, lambda content, path: None)
        return bool(taken.files)

    other = torch.empty(2 << 20, dtype=torch.uint8)
    plain = torch.empty(3 << 20, dtype=torch.uint8)  # 4 MiB if pinned
    pinned = plain.as_subclass(OnGpu)
    contents = [{"a": pinned, "b": pinned[:1]}, {"a": pinned, "b": pinned}, [plain], [plain, plain[1:]]]
    sizes = [torch.empty(size, dtype=torch.uint8) for size in (0, 1, 1024, 1025, 4095)]
    return {
        "bytes on a GPU": [module.host_bytes(size.as_subclass(OnGpu)) for size in sizes],
        "bytes on the host": [module.host_bytes(size) for size in sizes],
        "held with 8 MiB free": [held(content, 8 << 20) for content in contents],
        "held with 6 MiB free": [held(content, 6 << 20) for content in contents],
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "4096", "memory.current": "3000", "memory.stat": "anon 1\ninactive_file 500\n"}, 1596),
        ({"memory.max": "max", "memory.current": "3000"}, None),
        ({"memory/memory.limit_in_bytes": "4096", "memory/memory.usage_in_bytes": "5000"}, 0),
        ({}, None),
    ],
)
def test_free_memory_is_what_the_container_may_still_take(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    """None: the machine's, where the container has no limit."""
    import psutil

    from finetune_trainer.worker.memory import available_bytes

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = available_bytes(tmp_path)
    assert found == expected if expected is not None else found > psutil.virtual_memory().total // 100
