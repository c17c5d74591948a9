"""No pickle is ever executed: wherever one is planted among what a worker loads, it is refused by name and never runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.train.methods.case import Case, merged
from tests.train.methods.cases_distillation import CASES as DISTILLATION
from tests.train.methods.cases_reinforcement import prompts, reinforcement
from tests.train.worker.runs import Work, in_child, plant_pickle, records, work_for

REFUSED = 89
IN_CHECKPOINT = (
    "resume/optimizer.pt",
    "resume/scheduler.pt",
    "resume/scaler.pt",
    "resume/rng_state.pth",
    "resume/adapter_model.bin",
    "resume/pytorch_model.bin",
    "resume/optimizer.bin",
    "resume/state.pkl",
    "resume/adapter_model.safetensors",
    "best/adapter_model.bin",
)
_EARLIER = {"model": {"adapter": {"uri": "s3://b/adapter", "access": {}}}}
_REWARD = {"model": {"uri": "s3://b/reward", "access": {}}, "weight": 1.0}
# Where weights are read from, the file that is put in their place, and the run that reads them.
IN_INPUTS: Mapping[str, tuple[str, Case]] = {
    "base model": ("inputs/model/pytorch_model.bin", Case("base", {}, records(), {})),
    "earlier adapter": ("inputs/adapter/adapter_model.bin", Case("adapter", {}, records(), _EARLIER)),
    "teacher": ("inputs/teacher/pytorch_model.bin", next(case for case in DISTILLATION if case.name == "distillation")),
    "reward model": (
        "inputs/rewards/0/pytorch_model.bin",
        Case(
            "reward",
            {},
            prompts(),
            reinforcement("GRPO", [_REWARD]),
            models={"rewards/0": {"family": "llama", "labels": ("reward",)}},
        ),
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A finished run with a checkpoint at step 2."""
    work = work_for(tmp_path_factory.mktemp("finished") / "w", saveSteps=2)
    assert work.train() == [0], work.logged()
    return work


def _refused(work: Work, bomb: Path, name: str) -> None:
    assert work.train() == [REFUSED], work.logged()
    error = work.read("state/error-0.json")
    assert error["class"] == "UnsafeFile"
    assert name in error["message"], error["message"]
    assert not bomb.exists()


@pytest.mark.parametrize("planted", IN_CHECKPOINT)
def test_a_pickle_in_a_checkpoint_is_refused_by_name_and_never_runs(
    finished: Work, tmp_path: Path, planted: str
) -> None:
    resumed = finished.resumed_from(finished, 2, tmp_path / "resumed")
    path = resumed.root / planted
    if path.parts[-2] == "best":
        resumed = _worse_than_its_best(finished, tmp_path / "worse")
        path = resumed.root / planted
    in_child(plant_pickle, str(tmp_path / "planted"), "state", str(tmp_path / "was-run"))
    shutil.move(tmp_path / "planted", path)
    _refused(resumed, tmp_path / "was-run", path.name)


def _worse_than_its_best(finished: Work, root: Path) -> Work:
    """A further attempt whose last step is worse than step 1, the weights of which it takes back."""
    document = merged(finished.run.to_json(), {"checkpoint": {"keepBest": 1}})
    resumed = Work(finished.root, type(finished.run).from_json(document)).resumed_from(finished, 4, root)
    carried = resumed.read("resume/run.json")
    (root / "resume/run.json").write_text(json.dumps({**carried, "best": [[1, 0.0]]}))
    shutil.copytree(root / "resume", root / "best")
    return resumed


@pytest.mark.parametrize("place", IN_INPUTS)
def test_pickled_weights_among_the_inputs_are_refused_by_name_and_never_run(
    finished: Work, tmp_path: Path, place: str
) -> None:
    name, case = IN_INPUTS[place]
    work = case.work(tmp_path / "w")
    path = work.root / name
    if place == "earlier adapter":
        shutil.copytree(finished.root / "artifact/adapter", path.parent)
    for weights in path.parent.glob("*.safetensors"):
        weights.unlink()
    in_child(plant_pickle, str(path), "weights", str(tmp_path / "was-run"))
    _refused(work, tmp_path / "was-run", path.name)


def test_pickles_beside_safetensors_are_never_read(finished: Work, tmp_path: Path) -> None:
    """They are not fetched either; a folder that is mounted may still show them."""
    places = [IN_INPUTS[place] for place in ("earlier adapter", "base model")]
    work = places[0][1].work(tmp_path / "w")
    shutil.copytree(finished.root / "artifact/adapter", work.root / "inputs/adapter")
    for name, _ in places:
        in_child(plant_pickle, str(work.root / name), "weights", str(tmp_path / "was-run"))
    assert work.train() == [0], work.logged()
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("make", ["torch", "plain"])
def test_files_that_are_no_state_are_told_from_state(finished: Work, tmp_path: Path, make: str) -> None:
    """A pickle without torch's container is refused too, and what a run has written itself is let through."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(finished.root / "checkpoints/step-2", folder)
    assert in_child(_found, str(folder)) is None
    planted = {"torch": _plain_tensor, "plain": _plain_pickle}[make]
    in_child(planted, str(folder / "scheduler.pt"))
    assert (in_child(_found, str(folder)) is None) == (make == "torch")


def _found(folder: str) -> str | None:
    from finetune_api.failures import FinetuneError
    from finetune_trainer.worker.resume import refuse_pickles

    try:
        refuse_pickles(Path(folder))
    except FinetuneError as error:
        return f"{error.failure_class}: {error}"
    return None


def _plain_tensor(path: str) -> None:
    import torch

    torch.save({"step": torch.zeros(3)}, path)


def _plain_pickle(path: str) -> None:
    import pickle

    Path(path).write_bytes(pickle.dumps({"step": 3}))
