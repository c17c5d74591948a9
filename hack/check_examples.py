"""Checks every file under examples/: schema, rules, no nulls, nothing that this release cannot do.

`python -m hack.check_examples [FOLDER]` prints each fault and exits with 1 if there is one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from pydantic import ValidationError

from finetune_api import crd
from finetune_api.failures import FinetuneError
from finetune_api.planner import build_references, unsupported
from finetune_api.pool import GPUPoolSpec
from finetune_trainer.cli.jobfile import JobFileError, read_job_file

ROOT = Path(__file__).resolve().parents[1]
MAIN = "finetunejob.yaml"
LOCAL = "local.yaml"
TINY = "tiny"  # the folder of examples for `finetune run`
MAIN_LINES = 12
DEFINITIONS = {"FineTuneJob": crd.finetunejob, "GPUPool": crd.gpupool}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The structural schema as JSON schema draft 4 that refuses unknown fields, as the API server does for kubectl."""
    node = deepcopy(schema)
    _close(node)
    node["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}},
        "additionalProperties": False,
    }
    node["properties"].pop("status")
    return node


@functools.cache
def _validator(kind: str) -> jsonschema.Draft4Validator:
    schema = DEFINITIONS[kind]()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return jsonschema.Draft4Validator(closed(schema))


def _close(node: dict[str, Any]) -> None:
    for child in node.get("properties", {}).values():
        _close(child)
    if "items" in node:
        _close(node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        _close(node["additionalProperties"])
    elif "properties" in node:
        node["additionalProperties"] = False


def nulls(value: Any, path: str) -> Iterator[str]:
    """The paths of empty values: server-side apply refuses them."""
    if value is None or value == {} or value == []:
        yield path
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from nulls(child, f"{path}.{name}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from nulls(child, f"{path}[{index}]")


def lines_below_spec(text: str) -> int:
    """Lines of the spec that are neither empty nor a comment."""
    below = text.split("\nspec:\n", 1)[1].splitlines()
    return len([line for line in below if line.strip() and not line.strip().startswith("#")])


def faults(path: Path) -> Iterator[str]:
    """Everything that is wrong with one example."""
    text = path.read_text()
    for document in yaml.safe_load_all(text):
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind not in DEFINITIONS:
            yield f"the kind {kind!r} is not ours"
            continue
        for empty in nulls(document, kind):
            yield f"{empty} has no value; remove it"
        for error in _validator(kind).iter_errors(document):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        if kind == "GPUPool":
            try:
                GPUPoolSpec.from_json(document["spec"])
            except ValidationError as error:
                yield str(error)
        else:
            yield from _job_faults(path)
    if path.name == MAIN and lines_below_spec(text) > MAIN_LINES:
        yield f"has {lines_below_spec(text)} lines below spec; at most {MAIN_LINES} are promised"


def _job_faults(path: Path) -> Iterator[str]:
    try:
        spec = read_job_file(path).spec  # the same rules as the API server's
        build_references(spec, local=path.name == LOCAL or path.parent.name == TINY)
    except JobFileError as error:
        yield from (f"line {fault.line}: {fault.field}: {fault.message}" for fault in error.faults)
    except FinetuneError as error:
        yield str(error)
    else:
        yield from (f"{item.field}: {item.message}" for item in unsupported(spec))


def main(folder: Path = ROOT / "examples") -> int:
    """Print what is wrong with the examples in folder; 1 if anything is."""
    files = sorted(folder.rglob("*.yaml"))
    found = [f"{path.relative_to(folder.parent)}: {fault}" for path in files for fault in faults(path)]
    if not files:
        found = [f"{folder} holds no example"]
    for fault in found:
        print(fault)
    if not found:
        print(f"{len(files)} examples are valid")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
