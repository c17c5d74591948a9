"""Digests are stable: over key order, and from release to release."""

from __future__ import annotations

import pytest

from finetune_api.digest import canonical_json, digest
from finetune_api.planner import spec_digest
from tests.unit.api import values


def test_the_digest_of_a_known_document_never_changes() -> None:
    # sha256 of {"a":[1,2.5,"ü"],"b":null}, worked out by hand with sha256sum.
    expected = "sha256:9235ac36a7f51da8cb88a7e421b2b4a94bade4ce4f6cb9fdd85bba6320538d0e"
    assert canonical_json({"b": None, "a": [1, 2.5, "ü"]}) == '{"a":[1,2.5,"ü"],"b":null}'
    assert digest({"b": None, "a": [1, 2.5, "ü"]}) == expected
    assert digest({"a": [1, 2.5, "ü"], "b": None}) == expected


def test_what_is_no_json_number_has_no_digest() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        digest({"loss": float("nan")})


def test_the_spec_digest_covers_what_defines_the_run_and_nothing_else() -> None:
    base = spec_digest(values.spec())
    assert spec_digest(values.spec(suspend=True, deadlineSeconds=60, retry={"maxFailures": 1}, cancel=True)) == base
    assert spec_digest(values.spec(ttlSecondsAfterFinished=0)) == base
    assert spec_digest(values.spec(model={"revision": "v2"})) != base
    assert spec_digest(values.spec(hyperparameters={"seed": 1})) != base
    assert spec_digest(values.spec(priorityClassName="high")) != base
