"""The failure table is complete, unambiguous, and the only place that the code takes classes from."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import ANY, NEVER, TABLE, Fault, FinetuneError, by_exit_code, exit_codes

ROOT = Path(__file__).parents[3]
PROGRAMS = ("api/finetune_api", "operator/finetune_operator", "trainer-image/finetune_trainer")


def test_names_and_exit_codes_are_unique() -> None:
    codes = [row.exit_code for row in TABLE.values() if row.exit_code is not None]
    assert [code for code, count in Counter(codes).items() if count > 1] == []
    assert all(name == row.name for name, row in TABLE.items())
    lowered = Counter(name.lower() for name in TABLE)
    assert [name for name, count in lowered.items() if count > 1] == [], "two classes would share one runbook anchor"


def test_exit_codes_stay_clear_of_the_shells_and_of_signals() -> None:
    assert [code for code in exit_codes() if not 64 <= code <= 127] == []
    assert exit_codes() == tuple(sorted(exit_codes()))


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_every_class_says_what_happened_and_what_to_do(row) -> None:
    assert row.name[0].isupper() and row.name.isalnum()
    for text in (row.summary, row.hint):
        assert text.endswith(".") and len(text.split()) >= 4, text
    assert row.runbook == f"docs/failures.md#{row.name.lower()}"


def test_an_exit_code_names_its_class_and_any_other_is_unknown() -> None:
    for row in TABLE.values():
        if row.exit_code is not None:
            assert by_exit_code(row.exit_code) is row
    for code in (0, 1, 2, 63, 128, 137, 143, 255):
        assert by_exit_code(code).name == "Unknown"


def test_an_interruption_is_always_tried_again() -> None:
    interruptions = {row.name for row in TABLE.values() if row.fault == Fault.INTERRUPTION}
    assert interruptions == {"Stopped", "RolledBack", "Evicted", "NodeLost", "AttemptDeleted"}
    assert all(TABLE[name].retries == ANY and not TABLE[name].counted for name in interruptions)


def test_no_gpu_hour_is_spent_on_retrying_a_mistake_of_the_user() -> None:
    tried_again = {row.name for row in TABLE.values() if row.fault == Fault.USER and row.retriable}
    assert tried_again == {"QuotaExceeded"}, "which waits for room, and runs nothing meanwhile"


def test_retries_are_bounded_by_class() -> None:
    bounds = {row.name: row.retries for row in TABLE.values() if row.retries not in (NEVER, ANY)}
    assert bounds == {
        "OutOfGpuMemory": 1,
        "OutOfHostMemory": 1,
        "DiskFull": 1,
        "ContainerCannotRun": 2,
        "AcceleratorMismatch": 2,
        "Internal": 2,
        "Unknown": 2,
    }
    assert max(row.retries for row in TABLE.values()) == 100, "the most that spec.retry.maxFailures may be"


def test_waiting_for_room_is_no_failure() -> None:
    waiting = {row.name for row in TABLE.values() if row.waits_for_room}
    assert waiting == {"Unschedulable", "QuotaExceeded", "NameTaken"}
    assert all(TABLE[name].retries == ANY and not TABLE[name].counted for name in waiting)


def test_the_nodes_at_fault_are_avoided() -> None:
    assert {row.name for row in TABLE.values() if row.avoids_node} == {
        "NodeLost",
        "AcceleratorMismatch",
        "ContainerCannotRun",
    }


def test_an_error_carries_its_row_and_its_field() -> None:
    error = FinetuneError("rows 3 and 4 are empty", failure_class="DataInvalid", field="spec.dataset.sources[0]")
    assert (error.row.name, error.row.exit_code, error.field) == ("DataInvalid", 65, "spec.dataset.sources[0]")
    assert str(error) == "rows 3 and 4 are empty"
    assert FinetuneError("x").row.name == "Internal"


def _named_classes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every class that a program names: `failure_class="X"` in a call or an assignment, and `TABLE["X"]`."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="failure_class", value=ast.Constant(value=str(name))):
                yield node.value.lineno, name
            case ast.Assign(targets=[ast.Name(id="failure_class")], value=ast.Constant(value=str(name))):
                yield node.lineno, name
            case ast.AnnAssign(target=ast.Name(id="failure_class"), value=ast.Constant(value=str(name))):
                yield node.lineno, name
            case ast.Subscript(value=ast.Name(id="TABLE"), slice=ast.Constant(value=str(name))):
                yield node.lineno, name


def test_every_class_that_the_code_names_is_in_the_table() -> None:
    found = {
        (path.relative_to(ROOT), line, name)
        for program in PROGRAMS
        for path in sorted((ROOT / program).rglob("*.py"))
        for line, name in _named_classes(ast.parse(path.read_text()))
    }
    assert len(found) > 10, "the search finds nothing: has the keyword been renamed?"
    # Info is a remark of preflight that stops nothing.
    assert [f"{path}:{line} {name}" for path, line, name in sorted(found) if name not in TABLE and name != "Info"] == []
