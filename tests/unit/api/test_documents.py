"""The documents that cross from the trainer to the operator: bounded, and strict about what they take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.documents import TERMINATION_BYTES, ProgressDocument, Stage, TerminationMessage

GOOD: dict[str, Any] = {"version": 1, "attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "loss": 1.25}


def parse(text: str | bytes) -> ProgressDocument:
    """As the operator parses what a pod sends."""
    return ProgressDocument.model_validate_json(text, strict=True)


def test_a_progress_document_is_read_as_it_was_written() -> None:
    document = ProgressDocument(attempt=2, stage=Stage.TRAINING, step=3, total_steps=40, loss=1.25)
    assert document.to_json() == GOOD
    assert parse(json.dumps(GOOD)) == document


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "loss": NaN}', "loss"),
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "loss": Infinity}', "loss"),
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "learningRate": 1e999}', "learningRate"),
        ('{"attempt": 2, "stage": "Training", "step": 99999999999999999999, "totalSteps": 40}', "step"),
        ('{"attempt": 2, "stage": "Training", "step": -1, "totalSteps": 40}', "step"),
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 2147483649}', "totalSteps"),
        ('{"attempt": 100001, "stage": "Training", "step": 3, "totalSteps": 40}', "attempt"),
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "etaSeconds": 1e30}', "etaSeconds"),
        ('{"attempt": 2, "stage": "Training", "step": "3", "totalSteps": 40}', "step"),
        ('{"attempt": 2, "stage": "Training", "step": true, "totalSteps": 40}', "step"),
        ('{"attempt": 2, "stage": "Mining", "step": 3, "totalSteps": 40}', "stage"),
        ('{"attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40, "note": "hi"}', "note"),
        ('{"attempt": 2, "stage": "Training", "totalSteps": 40}', "step"),
        ('{"version": 2, "attempt": 2, "stage": "Training", "step": 3, "totalSteps": 40}', "version"),
    ],
)
def test_what_is_not_a_progress_document_is_refused_by_field(text: str, where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(text)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"Training"', b"\xff\xfe"])
def test_what_is_not_even_a_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValidationError):
        parse(text)


def test_a_short_termination_message_is_kept_whole() -> None:
    message = TerminationMessage(outcome="Succeeded", step=40, artifact="adapter", base_eval_loss=2.5, eval_loss=1.5)
    assert json.loads(message.encode()) == {
        "version": 1,
        "outcome": "Succeeded",
        "message": "",
        "step": 40,
        "artifact": "adapter",
        "baseEvalLoss": 2.5,
        "evalLoss": 1.5,
    }


@pytest.mark.parametrize(
    "text",
    ["x" * 2048, "é" * 2048, "漢" * 2048, "🙂" * 2048, "\x01" * 2048, '"\\' * 1024, "a" + "🙂" * 2047],
    ids=["ascii", "two-bytes", "three-bytes", "four-bytes", "control", "escaped", "unaligned"],
)
def test_a_long_message_is_cut_to_what_the_kubelet_keeps_and_stays_json(text: str) -> None:
    data = TerminationMessage(outcome="DataInvalid", message=text, field="spec.dataset.sources[0]").encode()
    assert len(data) <= TERMINATION_BYTES
    document = json.loads(data)
    assert text.startswith(document["message"]) and len(document["message"]) >= 200
    assert (document["outcome"], document["field"]) == ("DataInvalid", "spec.dataset.sources[0]")


def test_fields_at_their_bounds_leave_room_for_an_end() -> None:
    worst = TerminationMessage(
        outcome="\x01" * 64,
        message="\x01" * 2048,
        field="\x01" * 256,
        step=2**31,
        checkpoint_step=2**31,
        artifact="\x01" * 64,
        base_eval_loss=-1.7976931348623157e308,
        eval_loss=-1.7976931348623157e308,
    )
    assert len(worst.encode()) <= TERMINATION_BYTES


def test_a_file_name_that_is_not_utf8_does_not_lose_the_message() -> None:
    name = b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    data = TerminationMessage(outcome="DataInvalid", message=f"{name}: row 3 is empty").encode()
    assert json.loads(data)["message"] == "caf?.csv: row 3 is empty"
