"""What pods write is hostile input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.planner import spec_digest
from finetune_operator.decide.documents import read_preflight, read_termination
from tests.unit.operator.builders import a_spec, passed

DIGEST = spec_digest(a_spec())


def good() -> dict[str, Any]:
    """A preflight result that is believed."""
    document: dict[str, Any] = passed(a_spec()).to_json()
    return document


def test_a_good_result_is_believed() -> None:
    assert read_preflight(json.dumps(good()), DIGEST) == passed(a_spec())


@pytest.mark.parametrize(
    "change",
    [
        {"specDigest": "sha256:other"},
        {"model": None},
        {"ok": "yes"},
        {"ok": False},
        {"findings": [{"class": "DataInvalid", "message": "but ok"}]},
        {"findingsTotal": -1},
        {"model": {**passed(a_spec()).to_json()["model"], "parameters": -5}},
        {"model": {**passed(a_spec()).to_json()["model"], "parameters": 2**63}},
        {"model": {**passed(a_spec()).to_json()["model"], "experts": -1}},
        {"furtherWeightBytes": {"objective.distillation.teacher.uri": -1}},
        {"digests": {f"path{number}": "sha256:0" for number in range(17)}},
        {"data": {**passed(a_spec()).to_json()["data"], "rows": 1.5}},
        {"filler": "x" * 5000},
    ],
)
def test_a_result_that_contradicts_itself_or_the_job_is_not_believed(change: dict[str, Any]) -> None:
    assert read_preflight(json.dumps({**good(), **change}), DIGEST) is None


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", "\x00", '{"ok": true}', "9" * 4096])
def test_what_is_no_document_is_no_result(text: str) -> None:
    assert read_preflight(text, DIGEST) is None
    assert read_termination(text) is None


def test_a_finding_of_an_unknown_class_is_shown_as_unknown() -> None:
    document = {**good(), "ok": False, "findings": [{"class": "Pwned", "message": "a\x1bb"}], "findingsTotal": 1}
    found = read_preflight(json.dumps(document), DIGEST)
    assert found is not None
    assert [(f.failure_class, f.message) for f in found.findings] == [("Unknown", "a b")]


@pytest.mark.parametrize(
    "document",
    [
        {"outcome": "NoSuchClass"},
        {"outcome": "Hang", "step": -1},
        {"outcome": "Hang", "step": "7"},
        {"outcome": "Hang", "unknownField": 1},
        {"outcome": "Hang", "evalLoss": float("nan")},
        {"outcome": "Hang", "version": 2},
    ],
)
def test_a_termination_message_is_read_strictly(document: dict[str, Any]) -> None:
    assert read_termination(json.dumps({"version": 1, **document})) is None
