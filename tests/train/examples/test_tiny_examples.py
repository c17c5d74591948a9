"""Every example at tiny size runs on a CPU, from its file to an artifact with a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hack.tiny_examples import EXAMPLES
from tests.train.examples.running import NAMES, Examples
from tests.train.worker.runs import in_child


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    root = tmp_path_factory.mktemp("tiny")
    in_child(_make, str(root))
    return Examples(root)


def _make(root: str) -> None:
    from hack.tiny_examples import make

    make(Path(root))


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_example_ends_with_its_artifact_and_a_report(name: str, examples: Examples) -> None:
    work = examples.run(name)
    report = work.read("artifact/report.json")
    result = work.read("state/result.json")
    assert report["objective"]["type"] == work.run.objective.type
    assert result["step"] == work.run.hyperparameters.total_steps
    assert (work.root / "artifact" / "report.md").stat().st_size > 500
    if result["artifact"] != "report":
        weights = list((work.root / "artifact" / result["artifact"]).glob("*.safetensors"))
        assert weights
    if work.run.hyperparameters.total_steps:
        lines = (work.root / "artifact/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
        assert steps == list(range(1, work.run.hyperparameters.total_steps + 1))


def test_every_example_for_a_gpu_pool_has_a_tiny_twin() -> None:
    real = {path.stem for folder in ("methods", "recipes") for path in (EXAMPLES.parent / folder).glob("*.yaml")}
    assert real == set(NAMES)
