"""Generates the CustomResourceDefinitions from the pydantic models.

A structural schema has no $ref, no null type and a description on every field; `python -m finetune_api.crd DIR`
writes one file per kind.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_api import rules
from finetune_api.base import Document
from finetune_api.job import GROUP, VERSION, FineTuneJobSpec
from finetune_api.pool import GPUPoolSpec, GPUPoolStatus
from finetune_api.status import FineTuneJobStatus

Schema = dict[str, Any]

_KEPT = {
    "type",
    "description",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minItems",
    "maxItems",
    "maxProperties",
    "format",
}

# Schema bounds on status exist so that the CEL cost of root rules stays legal; the operator cuts texts to them.
MAX_STATUS_TEXT = 4096


def structural(model: type[Document]) -> Schema:
    """The structural OpenAPI v3 schema of a model."""
    raw = model.model_json_schema(by_alias=True)
    return _convert(raw, raw.get("$defs", {}))


def _convert(node: Schema, defs: dict[str, Schema]) -> Schema:
    node = _flatten(node, defs)
    out: Schema = {key: value for key, value in node.items() if key in _KEPT}
    if "exclusiveMinimum" in out:  # OpenAPI v3.0 wants a boolean beside minimum
        out["minimum"], out["exclusiveMinimum"] = out["exclusiveMinimum"], True
    if "exclusiveMaximum" in out:
        out["maximum"], out["exclusiveMaximum"] = out["exclusiveMaximum"], True
    if out.get("type") == "integer":
        out["format"] = "int64"
    if "properties" in node:
        out["properties"] = {name: _convert(child, defs) for name, child in node["properties"].items()}
        required = [name for name in node.get("required", [])]
        if required:
            out["required"] = required
    elif isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(node["additionalProperties"], defs)
    if "items" in node:
        out["items"] = _convert(node["items"], defs)
    if "type" not in out:  # an untyped value, such as a setting of any type
        out["x-kubernetes-preserve-unknown-fields"] = True
    if name := node.get("title"):
        if found := rules.BY_MODEL.get(name):
            out["x-kubernetes-validations"] = [dict(rule) for rule in found]
    return out


def _flatten(node: Schema, defs: dict[str, Schema]) -> Schema:
    """Resolve $ref and Optional: what stands beside the reference (the field's description) wins."""
    if options := node.get("anyOf"):
        chosen = [option for option in options if option.get("type") != "null"]
        if len(chosen) != 1:
            raise ValueError(f"a union has no structural schema: {node}")
        beside = {key: value for key, value in node.items() if key not in ("anyOf", "default", "title")}
        return {**_flatten(chosen[0], defs), **beside}
    if ref := node.get("$ref"):
        beside = {key: value for key, value in node.items() if key not in ("$ref", "default", "title")}
        return {**_flatten(defs[ref.rsplit("/", 1)[1]], defs), **beside}
    return node


def _column(name: str, path: str, kind: str = "string", *, wide: bool = False, description: str) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path, "description": description}
    if wide:
        column["priority"] = 1
    return column


_JOB_COLUMNS = [
    _column("State", ".status.state", description="One word computed from the conditions."),
    _column("Progress", ".status.progress.summary", description="Percent and steps."),
    _column("Loss", ".status.progress.lossText", description="Training loss of the last logged step."),
    _column("ETA", ".status.progress.eta", description="Estimated time to the end of training."),
    _column("Pool", ".status.plan.pool", description="The GPUPool."),
    _column("Attempt", ".status.attempt", "integer", description="Number of the newest attempt."),
    _column("Age", ".metadata.creationTimestamp", "date", description="Age of the job."),
    _column(
        "Checkpoint",
        ".status.progress.checkpointStep",
        "integer",
        wide=True,
        description="Step of the newest checkpoint.",
    ),
    _column(
        "Goodput",
        ".status.goodput.percent",
        "integer",
        wide=True,
        description="Training that counts, in percent of the time since the first attempt began.",
    ),
    _column("Message", ".status.message", wide=True, description="One sentence about what happens."),
]

_POOL_COLUMNS = [
    _column("Accelerator", ".spec.accelerator", description="Kind of GPU."),
    _column("GiB", ".spec.gpuMemoryGiB", "number", description="Memory of one GPU."),
    _column("GPUs/Node", ".spec.gpusPerNode", "integer", description="GPUs of one node."),
    _column("Max-Nodes", ".spec.maxNodes", "integer", description="Nodes that the pool may have."),
    _column("Spot", ".spec.spot", "boolean", description="Whether nodes may be taken away."),
    _column("Ready", ".status.conditions[?(@.type=='Ready')].status", description="Whether pods can run."),
    _column("Age", ".metadata.creationTimestamp", "date", description="Age of the pool."),
]


def _crd(
    kind: str,
    plural: str,
    short: list[str],
    *,
    namespaced: bool,
    description: str,
    spec: Schema,
    status: Schema,
    columns: list[Schema],
) -> Schema:
    root: Schema = {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "The API version of this object."},
            "kind": {"type": "string", "description": "The kind of this object."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [dict(rule) for rule in rules.ROOT[kind]],
    }
    # Before the operator has seen an object, kstatus must not read it as done.
    status["default"] = {"observedGeneration": -1}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": short,
                "categories": ["ml"],
            },
            "scope": "Namespaced" if namespaced else "Cluster",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": columns,
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def _status(model: type[Document]) -> Schema:
    schema = structural(model)
    conditions = schema["properties"]["conditions"]
    conditions["x-kubernetes-list-type"] = "map"
    conditions["x-kubernetes-list-map-keys"] = ["type"]
    schema.pop("required", None)
    return schema


def finetunejob() -> Schema:
    """The CustomResourceDefinition of FineTuneJob."""
    return _crd(
        "FineTuneJob",
        "finetunejobs",
        ["ftj"],
        namespaced=True,
        description="A fine-tuning run: what to tune, on what data, how, and where the result goes.",
        spec=structural(FineTuneJobSpec),
        status=_status(FineTuneJobStatus),
        columns=_JOB_COLUMNS,
    )


def gpupool() -> Schema:
    """The CustomResourceDefinition of GPUPool."""
    return _crd(
        "GPUPool",
        "gpupools",
        ["gpupool"],
        namespaced=False,
        description="A kind of node that the platform team offers to fine-tuning jobs.",
        spec=structural(GPUPoolSpec),
        status=_status(GPUPoolStatus),
        columns=_POOL_COLUMNS,
    )


def write(folder: Path) -> None:
    """Write both definitions to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for crd in (finetunejob(), gpupool()):
        text = "# Generated by `make generate` from api/; do not edit.\n"
        text += yaml.safe_dump(crd, sort_keys=False, width=110, allow_unicode=True)
        (folder / f"{crd['metadata']['name']}.yaml").write_text(text)


if __name__ == "__main__":
    for target in sys.argv[1:]:
        write(Path(target))
