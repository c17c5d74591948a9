"""The generated CRDs: structural, bounded, described, and the same as the checked-in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import crd, rules
from finetune_api.job import FROZEN_FIELDS

ROOT = Path(__file__).parents[3]
CRDS = {"finetunejobs.finetune.dev.yaml": crd.finetunejob(), "gpupools.finetune.dev.yaml": crd.gpupool()}


def schema(definition: dict[str, Any]) -> dict[str, Any]:
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below node with its path; list items are path[], map values path{}."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from nodes(node["additionalProperties"], f"{path}{{}}")


SPECS = [
    (path, node)
    for definition in CRDS.values()
    for path, node in nodes(schema(definition)["properties"]["spec"], definition["spec"]["names"]["kind"] + ".spec")
]
STATUSES = [
    (path, node)
    for definition in CRDS.values()
    for path, node in nodes(schema(definition)["properties"]["status"], definition["spec"]["names"]["kind"] + ".status")
]


def test_the_schema_is_structural() -> None:
    for path, node in SPECS + STATUSES:
        forbidden = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "title", "nullable"} & node.keys()
        assert not forbidden, f"{path} has {forbidden}"
        assert node.get("type") in ("object", "array", "string", "integer", "number", "boolean") or node.get(
            "x-kubernetes-preserve-unknown-fields"
        ), path
        if node.get("type") == "object":
            assert ("properties" in node) != ("additionalProperties" in node), path


def test_nothing_that_defines_a_run_has_a_default() -> None:
    assert [path for path, node in SPECS if "default" in node] == []
    assert [path for path, node in STATUSES if "default" in node] == ["FineTuneJob.status", "GPUPool.status"]


def test_the_spec_leaves_no_value_untyped() -> None:
    assert [path for path, node in SPECS if "type" not in node] == []


def test_every_field_is_described() -> None:
    undescribed = [
        path for path, node in SPECS + STATUSES if not path.endswith(("[]", "{}")) and not node.get("description")
    ]
    assert undescribed == []


def test_every_string_list_map_and_number_of_the_spec_is_bounded() -> None:
    """The API server works out the cost of CEL rules from these bounds."""
    for path, node in SPECS:
        kind = node["type"]
        if kind == "string":
            assert "maxLength" in node or "enum" in node, path
        elif kind == "array":
            assert "maxItems" in node and node.get("minItems", 0) >= 1, f"{path}: an empty list says nothing"
        elif kind == "object" and "additionalProperties" in node:
            assert "maxProperties" in node, path
        elif kind == "integer":
            assert "maximum" in node and "minimum" in node, path


def test_absence_is_no_null() -> None:
    for path, node in SPECS:
        assert None not in node.get("enum", ()), path


def test_the_checked_in_files_are_the_generated_ones(tmp_path: Path) -> None:
    crd.write(tmp_path)
    for folder in (ROOT / "crds", ROOT / "charts/finetune-operator/crds"):
        for name in CRDS:
            assert (folder / name).read_text() == (tmp_path / name).read_text(), f"{folder / name}: run make generate"
        assert {path.name for path in folder.glob("*.yaml")} == CRDS.keys()


@pytest.mark.parametrize("name", CRDS)
def test_the_file_reads_back_as_the_definition(name: str) -> None:
    assert yaml.safe_load((ROOT / "crds" / name).read_text()) == CRDS[name]


def test_every_frozen_field_has_one_rule_that_names_its_path() -> None:
    found = [rule for rule in schema(CRDS["finetunejobs.finetune.dev.yaml"])["x-kubernetes-validations"]]
    frozen = [rule["fieldPath"] for rule in found if "is frozen" in rule["message"]]
    assert frozen == [f".spec.{name}" for name in FROZEN_FIELDS]
    for rule in found:
        assert rule["message"], rule


def test_every_rule_of_a_model_reaches_the_schema() -> None:
    written = [
        rule["rule"]
        for _, node in nodes(schema(CRDS["finetunejobs.finetune.dev.yaml"])["properties"]["spec"], "spec")
        for rule in node.get("x-kubernetes-validations", ())
    ]
    for name, group in rules.BY_MODEL.items():
        for rule in group:
            assert rule["rule"] in written, f"{name}: {rule['rule']}"


def test_members_that_rules_name_exist() -> None:
    """A rule about a member that was renamed would be refused by the API server at the latest; here it costs nothing."""
    for path, node in SPECS:
        for rule in node.get("x-kubernetes-validations", ()):
            for word in rule["rule"].replace("!", " ").replace("(", " ").replace(")", " ").split():
                if word.startswith("self.") and word.count(".") == 1:
                    assert word.removeprefix("self.") in node["properties"], f"{path}: {rule['rule']}"


def test_the_columns_are_those_that_people_are_promised() -> None:
    version = CRDS["finetunejobs.finetune.dev.yaml"]["spec"]["versions"][0]
    columns = version["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["State", "Progress", "Loss", "ETA", "Pool", "Attempt", "Age"]
    assert version["subresources"] == {"status": {}}
    status = schema(CRDS["finetunejobs.finetune.dev.yaml"])["properties"]["status"]
    for column in columns:
        if not column["jsonPath"].startswith(".status."):
            continue
        node = status
        for part in column["jsonPath"].removeprefix(".status.").split("."):
            node = node["properties"][part]
        assert node["type"] == column["type"], column["name"]


def test_a_fresh_object_is_not_read_as_done() -> None:
    for definition in CRDS.values():
        assert schema(definition)["properties"]["status"]["default"] == {"observedGeneration": -1}
        assert "required" not in schema(definition)["properties"]["status"]


def test_conditions_are_a_list_keyed_by_type() -> None:
    for definition in CRDS.values():
        conditions = schema(definition)["properties"]["status"]["properties"]["conditions"]
        assert conditions["x-kubernetes-list-type"] == "map"
        assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_short_names_and_scope() -> None:
    job, pool = (CRDS[name]["spec"] for name in sorted(CRDS))
    assert (job["names"]["shortNames"], job["names"]["categories"], job["scope"]) == (["ftj"], ["ml"], "Namespaced")
    assert pool["scope"] == "Cluster"
