"""Writes the reference pages from their sources in api/, and the other golden files.

`python -m hack.generate [FOLDER]` writes docs/reference/*.md, docs/failures.md and docs/supported.md below FOLDER
(the project), and then rewrites the golden files of tests/render. The same sources always give the same bytes.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from finetune_api import crd
from finetune_api.failures import (
    ANY,
    DEFAULT_MAX_FAILURES,
    MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT,
    TABLE,
    FailureClass,
    Fault,
)
from finetune_api.runbooks import RUNBOOKS
from hack.markdown import HEADER, Schema, cell
from hack.supported import supported

ROOT = Path(__file__).resolve().parents[1]
LARGEST_INTEGER = 2**31 - 1  # the bound of integers that have no bound of their own: not worth showing


# --- reference pages --------------------------------------------------------------------------------------------


def reference(definition: Schema) -> str:
    """The page of one kind: every field with its path, type, bounds and description."""
    names = definition["spec"]["names"]
    version = definition["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    group = definition["spec"]["group"]
    short = ", ".join(f"`{name}`" for name in names["shortNames"])
    scope = "in a namespace" if definition["spec"]["scope"] == "Namespaced" else "for the whole cluster"
    page = [
        f"# {names['kind']}\n",
        f"{root['description']}\n",
        f"`apiVersion: {group}/{version['name']}`, `kind: {names['kind']}`, {scope}. Short name: {short}.\n",
        "**Required** fields are marked; every other field may be left out, and then the operator chooses. "
        "`[]` in a path means each item of a list.\n",
        "## Rules of the whole object\n",
        *_root_rules(root["x-kubernetes-validations"]),
        "\n## Spec\n",
        "The API server also refuses every combination of methods that [supported.md](../supported.md) lists.\n",
        *_sections(root["properties"]["spec"], "spec"),
        "## Status\n",
        "The operator writes it; a change by anybody else is overwritten.\n",
        *_sections(root["properties"]["status"], "status"),
        "## Columns of `kubectl get`\n",
        "| Column | Field | Shown | Meaning |",
        "|---|---|---|---|",
        *(
            f"| {column['name']} | `{column['jsonPath']}` | {'with -o wide' if column.get('priority') else 'always'} "
            f"| {column['description']} |"
            for column in version["additionalPrinterColumns"]
        ),
    ]
    return HEADER + "\n".join(page) + "\n"


def _root_rules(rules: list[Schema]) -> Iterator[str]:
    frozen = [rule for rule in rules if " is frozen " in rule["message"]]
    for rule in rules:
        if rule not in frozen:
            yield f"- {cell(rule['message'])}."
    if frozen:
        names = ", ".join(f"`{rule['fieldPath'].removeprefix('.')}`" for rule in frozen)
        text = frozen[0]["message"].split(" is frozen ", 1)[1]
        yield f"- {names}: each is frozen {cell(text)}."


def _sections(node: Schema, path: str) -> Iterator[str]:
    """One table per member of node that has members of its own, and one for the plain members."""
    with_members = {name: below for name, child in node["properties"].items() if (below := _members(child))}
    plain = {name: child for name, child in node["properties"].items() if name not in with_members}
    sections = {name: f"{path}.{name}{_items(node['properties'][name])}" for name in with_members}
    # A shape that has a section of its own is described there and nowhere else.
    seen = {_shape(below): _link(sections[name]) for name, below in with_members.items()}
    if plain:
        yield from _table(path, _rows({**node, "properties": plain}, path, seen))
    for name, below in with_members.items():
        required = " **Required.**" if name in node.get("required", ()) else ""
        yield f"### {sections[name]}\n"
        yield f"{cell(node['properties'][name]['description'])}{required}\n"
        rules = list(_rules(below, sections[name], seen))
        yield from _table(sections[name], _rows(below, sections[name], seen))
        if rules:
            yield from (*rules, "")


def _table(path: str, rows: Iterator[str]) -> Iterator[str]:
    yield f"| Field of `{path}` | Type | Bounds | Description |"
    yield "|---|---|---|---|"
    yield from rows
    yield ""


def _rows(node: Schema, path: str, seen: dict[str, str], prefix: str = "") -> Iterator[str]:
    for name, child in node["properties"].items():
        label = f"`{prefix}{name}`" + (" **required**" if name in node.get("required", ()) else "")
        below = _members(child)
        known = seen.get(_shape(below)) if below else None
        text = cell(child.get("description", "")) + (f" The same fields as {known}." if known else "")
        yield f"| {label} | {_type(child)} | {_bounds(child)} | {text} |"
        if below and not known:
            here = f"{prefix}{name}{_items(child)}"
            seen[_shape(below)] = f"`{path}.{here}`"
            yield from _rows(below, path, seen, f"{here}.")


def _rules(node: Schema, path: str, seen: dict[str, str]) -> Iterator[str]:
    """The rules of node and of what is described in its section."""
    for rule in node.get("x-kubernetes-validations", ()):
        yield f"- `{path}`: {cell(rule['message'])}."
    inside: dict[str, str] = dict(seen)
    for name, child in node["properties"].items():
        below = _members(child)
        if below and _shape(below) not in inside:
            inside[_shape(below)] = name
            yield from _rules(below, f"{path}.{name}{_items(child)}", inside)


def _items(node: Schema) -> str:
    return "[]" if node.get("type") == "array" else ""


def _link(section: str) -> str:
    return f"[`{section}`](#{section.lower().replace('.', '').replace('[]', '')})"


def _members(node: Schema) -> Schema | None:
    """The schema below node that has members: node itself or its list's item."""
    if "properties" in node:
        return node
    item = node.get("items", {})
    return item if "properties" in item else None


def _shape(node: Schema) -> str:
    """Two nodes of one shape have the same members, whatever their own descriptions."""
    return repr(node["properties"])


def _type(node: Schema) -> str:
    kind = node.get("type", "any")
    if kind == "array":
        return f"list of {_type(node['items'])}"
    if kind == "object" and "additionalProperties" in node:
        return f"map of {_type(node['additionalProperties'])}"
    if node.get("format") == "date-time":
        return "time"
    return str(kind)


def _bounds(node: Schema) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type")
    parts = []
    if kind in ("integer", "number"):
        if "minimum" in node:
            parts.append(f"{'>' if node.get('exclusiveMinimum') else '≥'} {node['minimum']:g}")
        if node.get("maximum", LARGEST_INTEGER) != LARGEST_INTEGER:
            parts.append(f"{'<' if node.get('exclusiveMaximum') else '≤'} {_number(node['maximum'])}")
    elif kind == "array":
        low, high = node.get("minItems", 0), node.get("maxItems")
        parts += [f"{low} to {high} items"] if high else []
        parts += [inner] if (inner := _bounds(node["items"])) else []
    elif kind == "string":
        parts += [f"at most {node['maxLength']} characters"] if "maxLength" in node else []
        parts += [f"`{cell(node['pattern'])}`"] if "pattern" in node else []
    elif "maxProperties" in node:
        parts.append(f"at most {node['maxProperties']} entries")
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


# --- failures ---------------------------------------------------------------------------------------------------

_WHO = {
    Fault.USER: "the owner of the job",
    Fault.PLATFORM: "the platform team",
    Fault.INTERRUPTION: "nobody",
    Fault.UNKNOWN: "whoever reads the log first",
}


def failures() -> str:
    """The page with one section per row of the failure table."""
    page = [
        "# Failures\n",
        "Every failure of a job has one class of this table. The class is the reason of the condition, the reason of "
        "the event and `status.failure.class`, and `status.failure.runbook` points to its section here. "
        "`status.failure.message` says what happened and where, `status.failure.field` which field to change.\n",
        "A failed attempt that may be retried is repeated after a pause that doubles each time, from 10 seconds to 10 "
        f"minutes, as often as its class says and at most `spec.retry.maxFailures` times in all ({DEFAULT_MAX_FAILURES} "
        "when absent). Interruptions and waiting for room do not count; "
        f"{MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT} interruptions in a row without a new checkpoint end the job with "
        "[NoProgress](#noprogress).\n",
        "Before the run is planned, the same classes tell what preflight found. What another try may mend is tried again, "
        "by the same rules and with counts of its own, which end with the plan; otherwise the state is `Invalid`, and "
        "mending the field in place starts preflight again.\n",
        "In the commands NAME is the job; add `-n NAMESPACE` where it is not your current one. POD, NODE, POOL and "
        "SECRET stand for what the message names. The pods of the last attempt stay until the next one starts.\n",
        "| Class | What happened | Who acts | Retried | Exit code |",
        "|---|---|---|---|---|",
        *(
            f"| [{row.name}](#{row.name.lower()}) | {row.summary} | {_WHO[row.fault]} | {_retried(row)} "
            f"| {row.exit_code or ''} |"
            for row in TABLE.values()
        ),
        "\nA class without an exit code is told by the operator or the cluster, not by a process of the trainer.\n",
        *(_section(row) for row in TABLE.values()),
    ]
    return HEADER + "\n".join(page)


def _retried(row: FailureClass) -> str:
    if not row.ends:
        return "goes on"
    if not row.retriable:
        return "no"
    if not row.counted:
        return "always, not counted"
    return "yes" if row.retries == ANY else f"yes, at most {row.retries}×"


def _section(row: FailureClass) -> str:
    book = RUNBOOKS[row.name]
    code = f"\n- **Exit code:** {row.exit_code}" if row.exit_code is not None else ""
    return "\n".join(
        (
            f"## {row.name}\n",
            f"{row.summary} {row.hint}\n",
            f"- **Symptom:** {book.symptom}",
            f"- **Who acts:** {_WHO[row.fault]}.",
            f"- **Retried:** {_retried(row)}.",
            f"- **Does another attempt help?** {book.again}{code}\n",
            "How to look:\n",
            "```sh",
            *book.look,
            "```\n",
            "Likely causes:\n",
            *(f"- {cause}" for cause in book.causes),
            "\nWhat to do:\n",
            *(f"{number}. {step}" for number, step in enumerate(book.act, 1)),
            "",
        )
    )


# --- all ----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Every generated page by its path below the project."""
    return {
        "docs/reference/finetunejob.md": reference(crd.finetunejob()),
        "docs/reference/gpupool.md": reference(crd.gpupool()),
        "docs/failures.md": failures(),
        "docs/supported.md": supported(),
    }


def main(folder: Path = ROOT) -> None:
    """Write the pages below folder and run the other generators of the project."""
    for name, text in pages().items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    runpy.run_module("tests.render", run_name="__main__")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
