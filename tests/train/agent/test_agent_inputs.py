"""What the agent fetches before a worker starts: everything that the run names, as it was planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.runfile import InputKind, RunFile
from finetune_trainer.agent.inputs import fetch_inputs
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.sources import Purpose, Reach, data_digest, fetch
from tests.train.agent.runs import run_file, write_inputs

REACH = Reach(env={}, allow_file=True)
EMPTY_WEIGHTS = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"


def reference(path: Path) -> dict[str, Any]:
    return {"uri": path.as_uri(), "access": {}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base model, an adapter, a teacher and four files of data."""
    folder = tmp_path / "place"
    write_inputs(folder)
    write_inputs(folder / "teacher")
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(EMPTY_WEIGHTS)
    for name in ("test", "general", "arc"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> RunFile:
    """A run that names all of it, planned from what is there now."""
    plain = run_file(
        (place / "base").as_uri(), (place / "train.jsonl").as_uri(), (tmp_path / "out").as_uri(), scratch=tmp_path / "s"
    ).to_json()
    plain["model"]["adapter"] = reference(place / "adapter")
    plain["objective"] = {
        "type": "Distillation",
        "distillation": {
            "teacher": reference(place / "teacher/base"),
            "teacherDigest": "",
            "temperature": 2.0,
            "alpha": 0.5,
            "quantizeTeacher": False,
        },
    }
    plain["dataset"]["test"] = reference(place / "test.jsonl")
    plain["evaluation"]["retention"] = reference(place / "general.jsonl")
    plain["evaluation"]["benchmarks"] = [{"name": "ArcEasy", "source": reference(place / "arc.jsonl")}]
    return planned(RunFile.from_json(plain), tmp_path / "planned")


def planned(run: RunFile, scratch: Path) -> RunFile:
    """The run with the digests of what is there, as preflight would give them."""
    got = {
        item.folder: fetch(
            item.reference, scratch / item.folder, purpose=Purpose[item.kind.name], field=item.field, reach=REACH
        )
        for item in run.inputs()
    }
    document = run.to_json()
    document["model"]["adapterDigest"] = got["adapter"].digest
    document["objective"]["distillation"]["teacherDigest"] = got["teacher"].digest
    data = [(item.reference.uri, got[item.folder].files) for item in run.inputs() if item.kind is InputKind.DATA]
    document["dataset"]["digest"] = data_digest(data)
    return RunFile.from_json(document)


def test_everything_that_the_run_names_is_fetched_once(run: RunFile, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    work.root.mkdir()
    assert fetch_inputs(run, work, REACH) is True
    found = sorted(str(path.relative_to(work.inputs)) for path in work.inputs.rglob("*") if not path.is_dir())
    assert found == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "benchmarks/0/arc.jsonl",
        "data/0/train.jsonl",
        "model/config.json",
        "model/model.safetensors",
        "retention/general.jsonl",
        "teacher/config.json",
        "teacher/model.safetensors",
        "test/test.jsonl",
    ]
    assert fetch_inputs(run, work, REACH) is False, "the same inputs are there already"
    moved = run.model_copy(update={"model": run.model.model_copy(update={"adapter": None, "adapter_digest": None})})
    assert fetch_inputs(moved, work, REACH) is True
    assert not (work.inputs / "adapter").exists(), "nothing of another run is left"


@pytest.mark.parametrize(
    ("changed", "failure_class", "field"),
    [
        ("base/model.safetensors", "InvalidSpec", "spec.model.uri"),
        ("adapter/adapter_model.safetensors", "InvalidSpec", "spec.model.adapter.uri"),
        ("teacher/base/config.json", "InvalidSpec", "spec.objective.distillation.teacher.uri"),
        ("test.jsonl", "DataInvalid", "spec.dataset.sources"),
        ("arc.jsonl", "DataInvalid", "spec.dataset.sources"),
    ],
)
def test_what_has_changed_since_the_plan_is_refused(
    run: RunFile, place: Path, tmp_path: Path, changed: str, failure_class: str, field: str
) -> None:
    path = place / changed
    path.write_bytes(path.read_bytes() + b"\n")
    work = WorkDir(tmp_path / "work")
    work.root.mkdir()
    with pytest.raises(FinetuneError, match="has changed since the run was planned") as caught:
        fetch_inputs(run, work, REACH)
    assert (caught.value.failure_class, caught.value.field) == (failure_class, field)
