"""The run file: what is written is what is read, and its digest says whether two runs are the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.planner import build_references, preflight_file
from finetune_api.runfile import PreflightFile, RunFile
from tests.unit.api import values


@pytest.mark.parametrize("kind", ["Full", "LoRA", "QLoRA"])
def test_a_run_file_survives_its_json(kind: str) -> None:
    run = values.plan(values.spec(tuning={"type": kind}), model=values.small_model()).run
    again = RunFile.from_json(json.loads(json.dumps(run.to_json())))
    assert again == run
    assert again.digest() == run.digest()


def test_the_digest_does_not_hang_on_the_order_of_keys() -> None:
    run = values.plan(values.spec()).run
    shuffled = dict(reversed(list(run.to_json().items())))
    assert RunFile.from_json(shuffled).digest() == run.digest()


def test_another_run_has_another_digest() -> None:
    base = values.plan(values.spec()).run.digest()
    assert values.plan(values.spec(hyperparameters={"seed": 7})).run.digest() != base
    assert values.plan(values.spec(), data=values.data_facts(digest="sha256:other")).run.digest() != base
    assert values.plan(values.spec()).run.digest() == base


def test_a_preflight_file_survives_its_json() -> None:
    job = values.spec(dataset={"format": "QuestionAnswer", "columns": {"prompt": "q", "completion": "a"}})
    document = preflight_file(job, values.JOB, build_references(job))
    assert PreflightFile.from_json(json.loads(json.dumps(document.to_json()))) == document


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"tuning": {"type": "Magic"}}, "tuning.type"),
        ({"hyperparameters": None}, "hyperparameters"),
    ],
)
def test_a_run_file_of_another_kind_is_refused_by_field(change: dict[str, Any], where: str) -> None:
    document = values.merge(values.plan(values.spec()).run.to_json(), change)
    with pytest.raises(ValidationError) as caught:
        RunFile.from_json(document)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


def test_a_run_file_holds_no_credentials() -> None:
    text = json.dumps(values.plan(values.spec()).run.to_json())
    assert "team-a-s3" not in text and "AWS_" not in text
