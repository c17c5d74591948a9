"""Faults that the trainer pod meets: the agent with a stand-in for the worker, or a real worker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from finetune_api.failures import TABLE
from tests.chaos.failures.scenario import Ending, Place, Scenario, scenario
from tests.train.agent.runs import UID
from tests.train.worker.runs import Work, in_child, plant_pickle, work_for

DATA = "spec.dataset.sources[0].uri"
STAND_INS = DATA
"""The field that the stand-in names, whatever it is told to fail with."""
RATE = "spec.hyperparameters.learningRate"


def _ended(place: Place, run: Any = None, **settings: Any) -> Ending:
    """The end of the agent's attempt."""
    agent = place.agents(run, **settings)
    code = agent.execute()
    said = agent.message
    return Ending(code, said.outcome, said.message, said.field)


def _worked(work: Work) -> Ending:
    """The end of a real worker."""
    (code,) = work.train()
    said = work.read("state/error-0.json")
    return Ending(code, said["class"], said["message"], said["field"])


def _fails(how: str, **does: Any) -> dict[str, Any]:
    return {"fail_rank": 0, "fail_how": how, **does}


# ---- the agent


@scenario("data-changed-since-the-plan", "DataInvalid", "spec.dataset.sources", "changed")
def data_changed(place: Place) -> Ending:
    run = place.runs()
    Path(run.dataset.sources[0].uri.removeprefix("file://")).write_text('{"prompt": "3 + 3 =", "completion": " 6"}\n')
    return _ended(place, run)


@scenario("output-taken-meanwhile", "OutputInUse", "spec.output.uri", "belongs to the job team-a/tiny")
def output_taken(place: Place) -> Ending:
    place.agents(place.runs(uid=UID.replace("0", "1"))).execute()
    return _ended(place)


@scenario("every-checkpoint-damaged", "CheckpointInvalid", None, "none of the", "is whole")
def every_checkpoint_damaged(place: Place) -> Ending:
    first = place.agents(does=_fails("class:Hang", steps=9, step_seconds=0.0, fail_step=6))
    first.execute()
    output = Path(first.run.output.target.uri.removeprefix("file://"))
    for part in output.glob("checkpoints/*/*/weights.bin"):
        part.write_bytes(b"x" * part.stat().st_size)
    return _ended(place, first.run, attempt=1)


@scenario("wrong-run-file", "InvalidSpec", None, "run.json")
def wrong_run_file(place: Place) -> Ending:
    agent = place.agents()
    agent.start()
    agent.process.kill()
    agent.process.wait()
    wrong = place.folder / "run.json"
    wrong.write_text('{"job": {}}')
    return _ended(place, arguments=("--run-file", str(wrong)))


@scenario("worker-without-last-words", "Internal", None, "boom in the worker")
def worker_without_last_words(place: Place) -> Ending:
    return _ended(place, does=_fails("code:1", last_words="boom in the worker"))


@scenario("segmentation-fault", "Internal", None, "ended by signal SIGSEGV")
def segmentation_fault(place: Place) -> Ending:
    return _ended(place, does=_fails("signal:11"))


@scenario("full-disk", "DiskFull", None, "could not write to the scratch disk")
def full_disk(place: Place) -> Ending:
    return _ended(place, does=_fails("full"))


@scenario("gpu-memory-at-one-record", "OutOfGpuMemory", "spec.hyperparameters.maxSequenceLength", "micro batch")
def gpu_memory(place: Place) -> Ending:
    return _ended(place, does={"most_records": 0, "memory_step": 2})


@scenario("loss-that-spikes-again-and-again", "LossSpike", STAND_INS, "had gone back 5 times")
def loss_spike(place: Place) -> Ending:
    run = place.runs()
    guards = run.guards.model_copy(update={"loss_spike": type(run.guards.loss_spike)("Rollback")})
    does = {"steps": 40, "step_seconds": 0.0, "spike_step": 9, "spike_factor": 0.0}
    return _ended(place, run.model_copy(update={"guards": guards}), does=does)


@scenario("hang", "Hang", None, "silent")
def hang(place: Place) -> Ending:
    does = {"steps": 100, "hang_step": 3, "step_seconds": 0.01}
    return _ended(place, does=does, arguments=("--hang-seconds", "1", "--start-seconds", "60"))


@scenario("no-artifact", "Internal", None, "left no artifact")
def no_artifact(place: Place) -> Ending:
    return _ended(place, does=_fails("code:0"))


@scenario("lost-contact", "CollectiveFailed", None, "Workers lost contact with one another")
def lost_contact(place: Place) -> Ending:
    return _ended(place, does=_fails("code:85"))


@scenario("kernel-kills-at-the-memory-limit", "OutOfHostMemory", None, "killed by the kernel at the pod's memory limit")
def memory_limit(place: Place) -> Ending:
    counter = place.folder / "memory.events"
    counter.write_text("oom_kill 0\n")
    agent = place.agents(does=_fails("signal:9", load_seconds=1.0), arguments=("--memory-events", str(counter)))
    agent.start()
    agent.wait_for_event("workers started")
    counter.write_text("oom_kill 1\n")
    return Ending(agent.finish(), agent.message.outcome, agent.message.message, agent.message.field)


@scenario("storage-gone-at-the-start", "StorageUnavailable", "spec.storage", "127.0.0.1:9")
def storage_gone(place: Place) -> Ending:
    run = place.runs()
    access = run.output.target.access.model_copy(update={"endpoint": "http://127.0.0.1:9", "region": "us-east-1"})
    target = run.output.target.model_copy(update={"uri": "s3://team-a/out", "access": access})
    run = run.model_copy(update={"output": run.output.model_copy(update={"target": target})})
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    return _ended(place, run, environment=keys)


# ---- a real worker


@scenario("loss-not-finite", "NonFiniteLoss", RATE, "is not finite")
def loss_not_finite(place: Place) -> Ending:
    return _worked(work_for(place.folder / "w", learningRate=1e30, schedule="Constant", totalSteps=8))


@scenario("adapter-names-no-layer", "InvalidSpec", "spec.tuning.lora.targetModules", "q_proj")
def adapter_names_no_layer(place: Place) -> Ending:
    work = work_for(place.folder / "w")
    lora = work.run.tuning.lora.model_copy(update={"target_modules": ["q_prog"]})
    run = work.run.model_copy(update={"tuning": work.run.tuning.model_copy(update={"lora": lora})})
    return _worked(Work(work.root, run))


@scenario("model-lacks-a-weight", "ModelUnsupported", "spec.model.uri", "model.norm.weight")
def model_lacks_a_weight(place: Place) -> Ending:
    work = work_for(place.folder / "w")
    in_child(_drop, str(work.root / "inputs/model/model.safetensors"), "model.norm.weight")
    return _worked(work)


def _drop(file: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


@scenario("pickle-in-a-checkpoint", "UnsafeFile", None, "scheduler.pt")
def pickle_in_a_checkpoint(place: Place) -> Ending:
    first = work_for(place.folder / "first", saveSteps=2)
    assert first.train() == [0], first.logged()
    second = first.resumed_from(first, 2, place.folder / "second")
    was_run = place.folder / "was-run"
    in_child(plant_pickle, str(second.root / "resume/scheduler.pt"), "scheduler", str(was_run))
    ending = _worked(second)
    assert not was_run.exists(), "the planted code has run"
    return ending


@scenario("no-gpu-on-the-node", "AcceleratorMismatch", None, "0 usable GPUs")
def no_gpu(place: Place) -> Ending:
    work = work_for(place.folder / "w")
    document = work.run.to_json()
    document["resources"]["accelerator"] = "a100-80"
    return _worked(Work(work.root, type(work.run).from_json(document)))


@scenario("records-longer-than-the-sequence", "DataInvalid", DATA, "truncation")
def records_longer_than_the_sequence(place: Place) -> Ending:
    work = work_for(place.folder / "w", maxSequenceLength=16)
    run = work.run.model_copy(update={"dataset": work.run.dataset.model_copy(update={"truncation": "Error"})})
    rows = [{"prompt": f"word {n} " * 60, "completion": "x"} for n in range(8)]
    path = work.root / "inputs/data/0/train.jsonl"
    path.write_text("".join(json.dumps(row) + os.linesep for row in rows))
    return _worked(Work(work.root, run))


SCENARIOS = [found for found in list(globals().values()) if isinstance(found, Scenario)]
assert all(found.failure_class in TABLE for found in SCENARIOS)
