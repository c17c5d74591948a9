"""DeepSpeed ZeRO by the CPU recipe: in force, exact, saved whole, resumed to the bit, closed to pickles."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import FULL, LORA, Work, finish, in_child, plant_pickle, start, work_for
from tests.train.worker.test_features_best import _same, worsening

DROPOUT = {"lora": {**LORA, "dropout": 0.2}}


def _losses(work: Work) -> list[float]:
    return [line["loss"] for line in work.metrics() if "loss" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The same run without ZeRO, in one process with the same global batch."""
    work = work_for(tmp_path_factory.mktemp("plain") / "w")
    assert work.train() == [0], work.logged()
    return work


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 1), (2, 2)])
def test_zero_trains_as_plain_torch_does_and_saves_a_whole_adapter(
    tmp_path: Path, plain: Work, stage: int, ranks: int
) -> None:
    work = work_for(
        tmp_path / "w",
        zeroStage=stage,
        processesPerNode=ranks,
        gradientAccumulation=2 // ranks,
        mergeAdapter=stage == 3,
    )
    assert work.train() == [0] * ranks, work.logged()
    assert _losses(work) == pytest.approx(_losses(plain), rel=1e-4)
    assert in_child(_smallest_norm_of_b, str(work.root / "artifact/adapter")) > 0, "each layer's update was saved"
    names = {path.name for path in (work.root / "checkpoints/step-4").rglob("*")}
    assert {f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)} <= names or {
        f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)
    } <= names, names
    assert not names & {"training_args.bin", "zero_to_fp32.py"}


def _smallest_norm_of_b(folder: str) -> float:
    from safetensors.torch import load_file

    weights = {name: t for name, t in load_file(f"{folder}/adapter_model.safetensors").items() if "lora_B" in name}
    assert len(weights) == 14, "seven linear layers in each of two blocks"
    return min(float(tensor.norm()) for tensor in weights.values())


def test_a_full_model_under_zero_3_is_published_whole(tmp_path: Path) -> None:
    sharded = work_for(tmp_path / "sharded", zeroStage=3, **FULL)
    whole = work_for(tmp_path / "whole", **FULL)
    assert sharded.train() == [0], sharded.logged()
    assert whole.train() == [0], whole.logged()
    assert in_child(_largest_difference, str(sharded.root), str(whole.root)) < 1e-3


def _largest_difference(first: str, second: str) -> float:
    from transformers import AutoModelForCausalLM

    found = [AutoModelForCausalLM.from_pretrained(f"{root}/artifact/model").state_dict() for root in (first, second)]
    assert found[0].keys() == found[1].keys()
    return max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A ZeRO-2 run of two processes with a checkpoint in the middle of an epoch."""
    work = _two(tmp_path_factory.mktemp("sharded") / "w")
    assert work.train() == [0, 0], work.logged()
    return work


def _two(root: Path) -> Work:
    changes: dict[str, Any] = {
        **DROPOUT,
        "zeroStage": 2,
        "processesPerNode": 2,
        "gradientAccumulation": 1,
        "saveSteps": 2,
    }
    return work_for(root, **changes)


def test_two_processes_resume_to_the_bit(tmp_path: Path, sharded: Work) -> None:
    resumed = sharded.resumed_from(sharded, 2, tmp_path / "resumed")
    assert resumed.train() == [0, 0], resumed.logged()
    assert resumed.losses("checkpoints/step-4") == sharded.losses("checkpoints/step-4")


def test_a_planted_pickle_in_a_shard_is_refused_and_never_runs(tmp_path: Path, sharded: Work) -> None:
    resumed = sharded.resumed_from(sharded, 2, tmp_path / "resumed")
    shard = next((resumed.root / "resume").rglob("*rank_1_mp_rank_00_optim_states.pt"))
    in_child(plant_pickle, str(shard), "optimizer_state_dict", str(tmp_path / "was-run"))
    assert resumed.train() == [89, 89], resumed.logged()
    for rank in (0, 1):
        error = resumed.read(f"state/error-{rank}.json")
        assert error["class"] == "UnsafeFile"
        assert shard.name in error["message"]
    assert not (tmp_path / "was-run").exists()


def test_another_number_of_processes_is_refused(tmp_path: Path, sharded: Work) -> None:
    one = work_for(tmp_path / "one", zeroStage=2)
    resumed = one.resumed_from(sharded, 2, tmp_path / "resumed")
    assert resumed.train() == [64], resumed.logged()
    error = resumed.read("state/error-0.json")
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.resources.gpus")
    assert "the number of processes of the run has to be 2" in error["message"]


@pytest.mark.parametrize("stage", [2, 3])
def test_of_several_nodes_each_takes_the_best_step_back_from_its_own_shards(tmp_path: Path, stage: int) -> None:
    """A node's disk holds what its own ranks wrote; only rank 0 writes what all of them need."""
    work = worsening(tmp_path / "node-0", totalSteps=8, zeroStage=stage, learningRate=3e-2, microBatchSize=2)
    document = work.run.to_json()
    document["checkpoint"]["keepBest"] = 1
    document["resources"] |= {"nodes": 2, "processesPerNode": 1}
    (tmp_path / "run.json").write_text(json.dumps(document))
    shutil.copytree(work.root, tmp_path / "node-1")
    assert finish(start(_lone_on_its_node, 2, str(tmp_path))) == [0, 0], work.logged()
    training = work.read("artifact/report.json")["training"]
    best = training["publishedStep"]
    assert best < training["steps"] == 8
    assert (
        work.read("state/result.json")["evalLoss"] == work.read("artifact/report.json")["evaluation"]["tuned"]["loss"]
    )
    assert in_child(_same, str(work.root / "best"), str(work.root / "artifact/adapter"))
    names = {path.name for path in (tmp_path / "node-1/best").rglob("*_states.pt")}
    assert not any("pp_rank_0" in name for name in names), "no shard has travelled"


def _lone_on_its_node(folder: str, env: dict[str, str]) -> int:
    from finetune_trainer.worker.main import main

    root = Path(folder) / f"node-{env['RANK']}"
    os.environ.update({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    log = os.open(root / "worker-0.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return main(["--run-file", f"{folder}/run.json", "--work", str(root)])
