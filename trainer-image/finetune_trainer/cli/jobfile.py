"""A FineTuneJob file: read, checked as the API server checks it, with the line of each fault.

Beside what a cluster takes, `file://./NAME` and `file://../NAME` name places relative to the folder of the job's file,
so that a job and its data can move together. Everything after this module sees absolute paths only.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from pydantic import BaseModel, ValidationError

from finetune_api import rules
from finetune_api.base import Document
from finetune_api.failures import FinetuneError
from finetune_api.job import API_VERSION, FineTuneJobSpec
from finetune_trainer.cli import cel
from finetune_trainer.cli.lines import Lines

KIND = "FineTuneJob"
_RELATIVE = ("file://./", "file://../")
_TOP = ("apiVersion", "kind", "metadata", "spec", "status")
_WORDS = {
    "missing": "is missing; add it",
    "string_pattern_mismatch": "has a form that is not allowed",
}


@dataclass(frozen=True)
class JobFile:
    """One FineTuneJob of a file. others: the kinds of the file's other documents, which are not used here."""

    path: Path
    name: str
    namespace: str
    spec: FineTuneJobSpec
    others: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """One thing to mend: the spec path, its line in the file, what is wrong and how to mend it."""

    field: str
    line: int
    message: str


class JobFileError(FinetuneError):
    """The file is not a valid FineTuneJob; `faults` holds everything that was found."""

    failure_class = "InvalidSpec"

    def __init__(self, path: Path, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [f"{path}:{fault.line}: {fault.field + ': ' if fault.field else ''}{fault.message}" for fault in faults]
        super().__init__("\n".join(lines), field=faults[0].field or None)


def read_job_file(path: Path) -> JobFile:
    """The file's FineTuneJob. Raises JobFileError."""
    documents = _documents(path)
    jobs = [(value, lines) for value, lines in documents if isinstance(value, dict) and value.get("kind") == KIND]
    if len(jobs) != 1:
        kinds = ", ".join(str(value.get("kind")) for value, _ in documents if isinstance(value, dict)) or "nothing"
        raise JobFileError(path, [Fault("", 1, f"one {KIND} is needed, the file has {len(jobs)} (it holds: {kinds})")])
    value, lines = jobs[0]
    faults = [Fault("", line, f"{name!r} stands twice; remove one") for name, line in lines.duplicates()]
    faults += _top_faults(value, lines)
    spec = None
    try:
        spec = FineTuneJobSpec.from_json(_absolute(value.get("spec"), path.absolute().parent))
    except ValidationError as error:
        faults += _spec_faults(error, lines)
    if spec is not None:
        faults += _rule_faults(spec, lines)
    if faults or spec is None:
        raise JobFileError(path, sorted(faults, key=lambda fault: fault.line))
    metadata = value["metadata"]
    others = tuple(str(other.get("kind")) for other, _ in documents if isinstance(other, dict) and other is not value)
    return JobFile(path, str(metadata["name"]), str(metadata.get("namespace") or "default"), spec, others)


def _absolute(value: Any, folder: Path) -> Any:
    """value with each `uri: file://./…` and `file://../…` below it as a path below folder."""
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: _absolute(item, folder) for name, item in value.items()}
    uri = found.get("uri")
    if isinstance(uri, str) and uri.startswith(_RELATIVE):
        path = os.path.normpath(folder / unquote(uri.removeprefix("file://")))
        found["uri"] = Path(path).as_uri()
    return found


def line_of(path: Path, field: str) -> int | None:
    """The line of a spec path such as `spec.dataset.sources[0].uri` in the file; None if it cannot be told."""
    try:
        documents = _documents(path)
    except JobFileError:
        return None
    parts = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", field)]
    found = (lines for value, lines in documents if isinstance(value, dict) and value.get("kind") == KIND)
    return next((lines.of(parts) for lines in found), None)


def _documents(path: Path) -> list[tuple[Any, Lines]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise JobFileError(path, [Fault("", 1, f"cannot read the file: {reason}")]) from None
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        values = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise JobFileError(path, [Fault("", mark.line + 1 if mark else 1, f"this is not YAML: {problem}")]) from None
    return [(value, Lines(node)) for value, node in zip(values, nodes, strict=True)]


def _top_faults(value: dict[str, Any], lines: Lines) -> Iterator[Fault]:
    if value.get("apiVersion") != API_VERSION:
        yield Fault("apiVersion", lines.of(["apiVersion"]), f"is {value.get('apiVersion')!r}; write {API_VERSION}")
    for name in value:
        if name not in _TOP:
            yield Fault(str(name), lines.of([name]), f"unknown field{_close_to(str(name), _TOP)}")
    metadata = value.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        yield Fault("metadata.name", lines.of(["metadata"]), "is missing; give the job a name")
        return
    for rule in rules.ROOT[KIND]:
        if "oldSelf" not in rule["rule"] and not cel.holds(rule["rule"], value):
            yield Fault("metadata.name", lines.of(["metadata", "name"]), rule["message"])


def _spec_faults(error: ValidationError, lines: Lines) -> Iterator[Fault]:
    for found in error.errors(include_url=False):
        path = ["spec", *(part for part in found["loc"])]
        message = _WORDS.get(found["type"], found["msg"])
        if found["type"] == "extra_forbidden":
            message = "unknown field" + _close_to(str(path[-1]), _fields_at(path[1:-1]))
        elif found["type"] != "missing" and not isinstance(found["input"], dict | list):
            message = f"is {found['input']!r}; {message[0].lower()}{message[1:]}"
        if found["type"] == "string_pattern_mismatch":
            message += f" (it has to match {found['ctx']['pattern']})"
        yield Fault(_dotted(path), lines.of(path), message)


def _rule_faults(spec: FineTuneJobSpec, lines: Lines) -> Iterator[Fault]:
    for path, model in _models(spec, ["spec"]):
        value = model.to_json()
        for rule in rules.BY_MODEL.get(type(model).__name__, ()):
            if not cel.holds(rule["rule"], value):
                place = [*path, *rule.get("fieldPath", "").split(".")[1:]]
                yield Fault(_dotted(place), lines.of(place), rule["message"])


def _models(model: Document, path: list[str | int]) -> Iterator[tuple[list[str | int], Document]]:
    yield path, model
    for name, info in type(model).model_fields.items():
        value, key = getattr(model, name), info.alias or name
        for part, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, Document):
                yield from _models(item, [*path, key] if part is None else [*path, key, part])


def _fields_at(path: Sequence[str | int]) -> list[str]:
    """The names that are allowed in the mapping at path of the spec."""
    model: type[BaseModel] | None = FineTuneJobSpec
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        info = next((info for name, info in model.model_fields.items() if (info.alias or name) == part), None)
        model = next((m for m in _models_in(info.annotation) if issubclass(m, BaseModel)), None) if info else None
    return [info.alias or name for name, info in model.model_fields.items()] if model else []


def _models_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _close_to(name: str, allowed: Sequence[str]) -> str:
    lowered = {other.lower(): other for other in allowed}
    found = difflib.get_close_matches(name.lower(), lowered, n=1)
    if found:
        return f"; did you mean {lowered[found[0]]}?"
    return f"; allowed are {', '.join(allowed)}" if allowed else ""


def _dotted(path: Sequence[str | int]) -> str:
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in path))
