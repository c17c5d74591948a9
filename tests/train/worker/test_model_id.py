"""The ID of a model: one for each run, kept through resumes, told in card and report."""

from __future__ import annotations

import re
from pathlib import Path

from tests.train.worker.runs import Work, work_for


def model_id(work: Work) -> str:
    assert work.train() == [0], work.logged()
    name = work.read("artifact/report.json")["modelId"]
    assert f"# {name}\n" in (work.root / "artifact/adapter/README.md").read_text()
    assert f"model ID is `{name}`" in (work.root / "artifact/report.md").read_text()
    return str(name)


def test_a_resumed_run_keeps_its_model_id_and_a_rerun_of_the_same_run_file_gets_another(tmp_path: Path) -> None:
    first = work_for(tmp_path / "first", saveSteps=2)
    name = model_id(first)
    assert re.fullmatch(r"team-a/tiny-[0-9a-f]{12}", name)
    resumed = first.resumed_from(first, 2, tmp_path / "resumed")
    assert model_id(resumed) == name
    rerun = work_for(tmp_path / "rerun", saveSteps=2)
    assert rerun.run.digest() == first.run.digest()
    assert model_id(rerun) != name
