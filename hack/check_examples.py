"""Checks every file under examples/: schema, rules, no nulls, nothing that this release cannot do, nothing that is missing.

What an example reads below tuned/ or by fromJob has to be what another one makes.

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
from finetune_api.job import FineTuneJobSpec, ObjectiveType, TuningType
from finetune_api.planner import NotFinished, build_references, named_jobs, resolve, unsupported, with_resolved
from finetune_api.pool import GPUPoolSpec
from finetune_api.status import Artifacts, Condition, ConditionStatus, ConditionType, FineTuneJobStatus
from finetune_trainer.cli.jobfile import JobFileError, read_job_file

ROOT = Path(__file__).resolve().parents[1]
MAIN = "finetunejob.yaml"
LOCAL = "local.yaml"
TINY = "tiny"  # the folder of examples for `finetune run`
TUNED = "/tuned/"  # where examples write
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
    local = is_local(path)
    try:
        spec = read_job_file(path).spec  # the same rules as the API server's
        build_references(resolved(spec), local=local)
    except JobFileError as error:
        yield from (f"line {fault.line}: {fault.field}: {fault.message}" for fault in error.faults)
    except (FinetuneError, NotFinished) as error:
        yield str(error)
    else:
        yield from (f"{item.field}: {item.message}" for item in unsupported(spec))
        yield from (
            f"{uri}: no example makes it" for uri in results_read(spec) if maker(uri, jobs(local=local)) is None
        )


def is_local(path: Path) -> bool:
    """Whether the example is for `finetune run` on one machine."""
    return path.name == LOCAL or path.parent.name == TINY


@functools.cache
def jobs(*, local: bool) -> dict[str, FineTuneJobSpec]:
    """The valid jobs among the examples for one machine, or for a cluster, by their names."""
    found = {}
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        document = yaml.safe_load(path.read_text())
        if document["kind"] == "FineTuneJob" and is_local(path) == local:
            try:
                found[document["metadata"]["name"]] = FineTuneJobSpec.from_json(document["spec"])
            except ValidationError:
                continue  # told of its own file
    return found


def results_read(spec: FineTuneJobSpec) -> list[str]:
    """The places below tuned/ that a job reads."""
    document = spec.to_json()
    del document["output"]
    return [text for text in _texts(document) if TUNED in text]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def maker(uri: str, among: dict[str, FineTuneJobSpec]) -> str | None:
    """Which of the jobs leaves a model or an adapter at uri."""
    output, _, folder = uri.rpartition("/")
    return next((name for name, job in among.items() if job.output.uri == output and folder in made(job)), None)


def made(spec: FineTuneJobSpec) -> set[str]:
    """The folders with weights that a job leaves below its output."""
    if spec.objective_type == ObjectiveType.EVALUATION:
        return set()
    if spec.tuning_type == TuningType.FULL:
        return {"model"}
    return {"adapter", "merged"} if spec.output.merge_adapter else {"adapter"}


def resolved(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """The job with what its fromJob fields stand for once the examples that they name have succeeded.

    Raises FinetuneError where such an example makes no model that fits, NotFinished where there is none.
    """
    known = jobs(local=False)
    found = [
        resolve(spec, path, (known[name], _succeeded(known[name])) if name in known else None)
        for path, name in named_jobs(spec).items()
    ]
    return with_resolved(spec, found)


def _succeeded(spec: FineTuneJobSpec) -> FineTuneJobStatus:
    """The status of a job that is done, as far as other jobs look at it."""
    uri, folders = spec.output.uri, made(spec)
    succeeded = Condition(
        type=ConditionType.SUCCEEDED,
        status=ConditionStatus.TRUE,
        reason="Completed",
        observed_generation=1,
        last_transition_time="2026-01-01T00:00:00Z",
    )
    artifacts = Artifacts(
        uri=uri,
        adapter=f"{uri}/adapter" if "adapter" in folders else None,
        model=next((f"{uri}/{name}" for name in ("model", "merged") if name in folders), None),
        report=f"{uri}/report.md",
    )
    return FineTuneJobStatus(conditions=[succeeded], artifacts=artifacts)


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
