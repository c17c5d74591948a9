"""Every class of the failure table has a runbook, and its commands and fields exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from finetune_api import crd, naming
from finetune_api.failures import TABLE, Fault
from finetune_api.runbooks import RUNBOOKS
from finetune_api.status import FineTuneJobStatus

SCHEMA = crd.finetunejob()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
LABELS = {naming.LABEL_JOB, naming.LABEL_ROLE, naming.LABEL_ATTEMPT, naming.LABEL_POOL, *naming.MANAGED_BY}


def test_each_class_has_one_runbook_and_no_runbook_is_left_over() -> None:
    assert set(RUNBOOKS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_runbook_has_all_its_parts(name: str) -> None:
    book = RUNBOOKS[name]
    assert len(book.symptom.split()) >= 8
    assert len(book.look) >= 2 and len(set(book.look)) == len(book.look)
    assert len(book.causes) >= 2
    assert book.act
    for text in (book.symptom, *book.causes, *book.act, book.again):
        assert text.endswith("."), text
        assert len(text.split()) >= 3, text


@pytest.mark.parametrize("name", TABLE)
def test_a_runbook_says_of_retries_what_the_table_does(name: str) -> None:
    row, again = TABLE[name], RUNBOOKS[name].again
    first = re.split(r"[ ,.:]", again, maxsplit=1)[0]
    if not row.ends:
        assert "goes on" in again
    elif row.fault == Fault.INTERRUPTION or row.waits_for_room:
        assert first == "Yes"
    elif row.retriable:
        assert first in ("Yes", "Often", "Sometimes", "Rarely")
        assert ("once more" in again) == (row.retries == 1)
        assert ("at most twice" in again) == (row.retries == 2)
    elif name != "ReferenceNotFound":  # which ends a planned run, and goes on by itself before the plan
        assert first == "No"


def commands() -> list[tuple[str, str]]:
    return [(name, command) for name, book in RUNBOOKS.items() for command in book.look]


@pytest.mark.parametrize(("name", "command"), commands())
def test_a_command_is_kubectl_with_labels_that_children_carry_and_paths_that_exist(name: str, command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "kubectl" and words[1] in ("get", "describe", "logs")
    for selector in (words[i + 1] for i, word in enumerate(words) if word == "-l"):
        assert {pair.split("=")[0] for pair in selector.split(",")} <= LABELS
    if words[2] == "ftj" and (path := re.search(r"jsonpath='(.+)'", command)):
        for found in re.findall(r"\.(status[\w.]*)", path.group(1)):
            assert exists(found), found


@pytest.mark.parametrize("name", TABLE)
def test_the_fields_that_a_runbook_names_exist(name: str) -> None:
    book = RUNBOOKS[name]
    text = " ".join((book.symptom, *book.causes, *book.act, book.again, TABLE[name].hint))
    for path in re.findall(r"`((?:spec|status)[\w.]*)`", text):
        assert exists(path), path
    spec = SCHEMA["properties"]["spec"]["properties"]
    for path in re.findall(r"`([\w.]+)(?:: \w+)?`", text):
        if path.split(".")[0] in spec:
            assert exists(f"spec.{path}"), path


def test_the_path_check_can_fail() -> None:
    assert exists("status.failure.runbook") and exists("spec.checkpoint.everyMinutes")
    assert not exists("status.failure.cause") and not exists("spec.checkpoint.everyHours")
    assert "goodput" in FineTuneJobStatus.model_fields


def exists(path: str) -> bool:
    """Whether the schema has that path; what is below an untyped value is not looked at."""
    node: dict[str, Any] = SCHEMA
    for part in path.split("."):
        node = node.get("items", node)
        if part not in node.get("properties", {}):
            return False
        node = node["properties"][part]
    return True
