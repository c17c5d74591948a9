"""A planned run cannot be edited: the API server refuses each frozen field by its path."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from finetune_api.job import FROZEN_FIELDS, FineTuneJobSpec
from finetune_api.naming import MANAGER_OPERATOR
from tests.api import objects
from tests.api.rest import Api, Object, Refused

pytestmark = pytest.mark.usefixtures("without_operator")

FULL: dict[str, Any] = {
    "objective": {"type": "Supervised"},
    "hyperparameters": {"maxSteps": 100, "learningRate": 2.0e-4},
    "evaluation": {"everySteps": 10},
    "checkpoint": {"everyMinutes": 5},
    "guards": {"lossSpike": "Rollback", "rollbackSteps": 50},
    "resources": {"pool": "l4", "gpus": 1},
    "storage": {"endpoint": "http://s3:9000", "pathStyle": True},
    "queueName": "team-a",
    "priorityClassName": "high",
}
CHANGED: dict[str, Any] = {
    "model": {"uri": "hf://tiiuae/falcon-7b", "revision": "v2"},
    "dataset": {"sources": [{"uri": "s3://team-a/faq/train.jsonl"}, {"uri": "s3://team-a/more.jsonl"}]},
    "objective": {"type": "DPO"},
    "tuning": {"type": "LoRA"},
    "output": {"uri": "s3://team-a/models/other"},
    "hyperparameters": {"maxSteps": 200, "learningRate": 2.0e-4},
    "evaluation": {"everySteps": 20},
    "checkpoint": {"everyMinutes": 1},
    "guards": {"lossSpike": "Off"},
    "resources": {"pool": "a40", "gpus": 1},
    "credentials": {"secretName": "other"},
    "storage": {"endpoint": "http://s3:9001", "pathStyle": True},
    "queueName": "team-b",
    "priorityClassName": "low",
}
REQUIRED = {name for name, field in FineTuneJobSpec.model_fields.items() if field.is_required()}
# tuning may be absent with objective Evaluation only, and then another rule speaks too.
OPTIONAL = [name for name in FROZEN_FIELDS if name not in REQUIRED | {"tuning"}]
MUTABLE: dict[str, tuple[Any, Any]] = {
    "suspend": (True, False),
    "cancel": (False, True),
    "retry": ({"maxFailures": 1}, {"maxFailures": 2}),
    "deadlineSeconds": (60, 120),
    "ttlSecondsAfterFinished": (60, 0),
}


def planned(api: Api, body: Object) -> Object:
    """The job as it stands once the operator has written its plan."""
    created = api.create("finetunejobs", body)
    meta = {key: created["metadata"][key] for key in ("name", "namespace")}
    status = {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": meta,
        "status": {"observedGeneration": 1, "plan": objects.plan()},
    }
    return api.apply("finetunejobs", status, manager=MANAGER_OPERATOR, status=True)


def edited(api: Api, stored: Object, field: str, value: Any) -> Object:
    """The job after an edit of one field of the spec; None removes the field."""
    body = deepcopy(stored)
    body["spec"][field] = value
    if value is None:
        del body["spec"][field]
    return api.replace("finetunejobs", body)


def assert_frozen(refusal: Refused, field: str) -> None:
    assert refusal.status == 422
    [(path, message)] = refusal.causes
    assert path == f"spec.{field}"
    assert f"{field} is frozen because the run is planned" in message
    assert "clone the job" in message


def test_every_field_of_the_spec_is_frozen_or_mutable() -> None:
    fields = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}
    assert fields == {*FROZEN_FIELDS} | {*MUTABLE}


@pytest.mark.parametrize("field", FROZEN_FIELDS)
def test_changing_a_planned_field_is_refused(api: Api, namespace: str, field: str) -> None:
    stored = planned(api, objects.job("faq", namespace, **FULL))
    with pytest.raises(Refused) as refusal:
        edited(api, stored, field, CHANGED[field])
    assert_frozen(refusal.value, field)


@pytest.mark.parametrize("field", OPTIONAL)
def test_removing_a_planned_field_is_refused(api: Api, namespace: str, field: str) -> None:
    stored = planned(api, objects.job("faq", namespace, **FULL))
    with pytest.raises(Refused) as refusal:
        edited(api, stored, field, None)
    assert_frozen(refusal.value, field)


@pytest.mark.parametrize("field", OPTIONAL)
def test_adding_a_field_to_a_planned_run_is_refused(api: Api, namespace: str, field: str) -> None:
    stored = planned(api, objects.job("faq", namespace, credentials=None))
    with pytest.raises(Refused) as refusal:
        edited(api, stored, field, CHANGED[field])
    assert_frozen(refusal.value, field)


@pytest.mark.parametrize("field", MUTABLE)
def test_what_does_not_define_the_run_stays_editable(api: Api, namespace: str, field: str) -> None:
    before, after = MUTABLE[field]
    stored = planned(api, objects.job("faq", namespace, **FULL))
    added = edited(api, stored, field, before)
    changed = edited(api, added, field, after)
    assert changed["spec"][field] == after


def test_before_the_plan_every_field_may_be_mended(api: Api, namespace: str) -> None:
    stored = api.create("finetunejobs", objects.job("faq", namespace, **FULL))
    for field in FROZEN_FIELDS:
        stored = edited(api, stored, field, CHANGED[field])
        assert stored["spec"][field] == CHANGED[field]
    for field in OPTIONAL:
        stored = edited(api, stored, field, None)
        assert field not in stored["spec"]


def test_several_edits_are_all_named(api: Api, namespace: str) -> None:
    stored = planned(api, objects.job("faq", namespace, **FULL))
    with pytest.raises(Refused) as refusal:
        api.patch(
            "finetunejobs", namespace, "faq", {"spec": {"model": {"revision": "v2"}, "output": {"uri": "s3://b/q"}}}
        )
    assert refusal.value.fields == ["spec.model", "spec.output"]
    assert api.get("finetunejobs", namespace, "faq")["metadata"]["generation"] == stored["metadata"]["generation"]


@pytest.mark.parametrize("value", [False, None], ids=["set to false", "removed"])
def test_cancel_cannot_be_taken_back(api: Api, namespace: str, value: bool | None) -> None:
    stored = api.create("finetunejobs", objects.job("faq", namespace, cancel=True))
    with pytest.raises(Refused) as refusal:
        edited(api, stored, "cancel", value)
    assert refusal.value.fields == ["spec.cancel"]
    assert "cancel cannot be taken back" in str(refusal.value)
