"""The report for people: report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ANSWER_CHARACTERS = 600
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def render_report(report: Mapping[str, Any], curves: Sequence[tuple[str, str]]) -> str:
    """Markdown of the report. curves: (title, file name) of each picture that lies beside it."""
    job = report["job"]
    parts = [
        f"# {job['namespace']}/{job['name']}",
        _summary(report),
        "## Before and after",
        *_evaluation(report),
        *_side_by_side("## Answers side by side", report["answers"]),
        *_side_by_side("## Probes", report["probes"]),
        *_notes_on_answers(report["evaluation"]["notes"]),
        *(["## Curves", *(f"![{title}]({name})" for title, name in curves)] if curves else []),
        "## Parameters",
        _parameters(report["parameters"]),
        *_training(report["training"]),
        *_guards(report["guards"], report["hyperparameters"]),
        *[f"Off: {field}, because {reason}." for field, reason in report["features"]["off"].items()],
        "## Data",
        _table(("What", "Value"), [(name, _cell(_plain(value))) for name, value in report["data"].items()]),
        "## Where it comes from",
        _table(("What", "Value"), _lineage(report["lineage"])),
        *_settings(report["settings"]),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: Mapping[str, Any]) -> str:
    base = f"`{report['lineage']['baseModel']}`{_revision(report['lineage'])}"
    if report["training"] is None:
        return f"Evaluation of {base}, {report['task']}. Nothing was trained."
    training = report["training"]
    text = f"{report['tuning']['type']} of {base}, {report['objective']['type']}, {training['steps']} steps."
    if training["stoppedEarly"]:
        text += f" It stopped early, before step {training['plannedSteps']}."
    if training["publishedStep"] != training["steps"]:
        text += f" Published is step {training['publishedStep']}, the best by {training['bestMetric']}."
    merged = ", merged into the base in `merged/`" if report["merged"] else ""
    size = _size(report["artifactBytes"])
    return f"{text} The result is in `{report['artifact']}/`{merged} ({size}). Its model ID is `{report['modelId']}`."


def _revision(lineage: Mapping[str, Any]) -> str:
    return f" at revision `{lineage['baseModelRevision']}`" if lineage["baseModelRevision"] else ""


def _evaluation(report: Mapping[str, Any]) -> list[str]:
    found = report["evaluation"]
    if not found["tuned"]:
        return ["No records were held out, so nothing was measured. Set dataset.validation to compare."]
    names = [*found["tuned"], *(name for name in found["base"] if name not in found["tuned"])]
    alone = found["base"] == found["tuned"] and report["training"] is None
    rows = [
        (
            _cell(name + (f" ({found['notes'][name]})" if name in found["notes"] else "")),
            *(() if alone else (_number(found["base"].get(name)),)),
            _number(found["tuned"].get(name)),
            *(() if alone else (_percent(found["changePercent"].get(name)),)),
        )
        for name in names
    ]
    header = ("Metric", "Value") if alone else ("Metric", "Base", "Tuned", "Change")
    texts = [f"On {found['records']} records of the {found['on']} data:", _table(header, rows)]
    if found["requirements"]:
        texts += ["Required (`evaluation.require`):", _table(("Metric", "Bounds", "Value", "Met"), _required(found))]
    return texts


def _required(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            _cell(item["metric"]),
            ", ".join(f"{key} {item[key]:g}" for key in ("min", "max") if key in item),
            _number(item["value"]),
            "yes" if item["met"] else "**no**",
        )
        for item in found["requirements"]
    ]


def _side_by_side(title: str, answers: Sequence[Mapping[str, str]]) -> list[str]:
    if not answers:
        return []
    columns = [name for name in ("prompt", "reference", "base", "tuned") if name in answers[0]]
    rows = [tuple(_cell(answer[name]) for name in columns) for answer in answers]
    return [title, _table(tuple(name.capitalize() for name in columns), rows)]


def _notes_on_answers(notes: Mapping[str, str]) -> list[str]:
    return [f"{name}: {note}." for name, note in notes.items() if name.startswith("generation.")]


def _parameters(parameters: Mapping[str, Any]) -> str:
    """Counts and shares: every count with a share of its own (trained, quantised, adapted) gets a row."""
    shares = {name: value for name, value in parameters.items() if name.endswith("Share")}
    rows = [
        (name, f"{value:,}" if isinstance(value, int) else _plain(value), _share(shares.get(f"{name}Share")))
        for name, value in parameters.items()
        if name not in shares
    ]
    return _table(("Parameters", "Number", "Share"), rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count:,} processes"


def _training(training: Mapping[str, Any] | None) -> list[str]:
    if training is None:
        return []
    rows = [
        ("Steps", f"{training['steps']:,}"),
        ("Records per step", f"{training['globalBatchSize']:,} on {_processes(training['processes'])}"),
        ("Tokens trained on", f"{training['tokens']:,}"),
        ("Time in training", f"{training['seconds']:,} s"),
        ("Tokens per second", _number(training["tokensPerSecond"])),
        ("Floating-point operations", f"{training['flops']:.3g}, by {_cell(training['flopsFormula'])}"),
    ]
    if training["peakGpuMemoryGiB"] is not None:
        rows.append(("Peak GPU memory of process 0", f"{training['peakGpuMemoryGiB']} GiB"))
    return ["## Training", _table(("What", "Value"), rows)]


def _guards(guards: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """Only where a guard has changed something."""
    texts = []
    if guards["microBatchSize"] != planned["microBatchSize"]:
        texts.append(
            f"The GPU ran out of memory with the planned micro batch of {planned['microBatchSize']}: the run went on with "
            f"{guards['microBatchSize']}, and gradients accumulated over {guards['gradientAccumulation']} passes. The "
            "records of a step are the planned ones."
        )
    if guards["rollbacks"]:
        rows = [
            (
                found["reason"],
                *(f"{found[name]:,}" for name in ("onsetStep", "toStep", "untilStep")),
                f"{found['factor']:g}",
            )
            for found in guards["rollbacks"]
        ]
        texts += [
            "The loss went wrong, and the run went back to an earlier checkpoint with a lower learning rate:",
            _table(("Reason", "Onset", "Back to, or before", "Lowered up to", "Of the planned rate"), rows),
        ]
    return ["## Guards", *texts] if texts else []


def _lineage(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("Base model", f"`{lineage['baseModel']}`{_revision(lineage)}"),
        ("Base model digest", f"`{lineage['baseModelDigest']}`"),
        ("Adapter", f"`{lineage['adapter']}`" if lineage["adapter"] else ""),
        ("Adapter digest", f"`{lineage['adapterDigest']}`" if lineage["adapterDigest"] else ""),
        ("Data", ", ".join(f"`{uri}`" for uri in lineage["datasets"])),
        ("Validation data", f"`{lineage['validation']}`" if lineage["validation"] else ""),
        ("Test data", f"`{lineage['test']}`" if lineage["test"] else ""),
        ("Data digest", f"`{lineage['datasetDigest']}`"),
        ("Run file digest", f"`{lineage['runFileDigest']}`"),
        ("Libraries", ", ".join(f"{name} {number}" for name, number in lineage["libraries"].items())),
    ]
    return [row for row in rows if row[1]]


def _settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    if not settings:
        return []
    columns = list(dict.fromkeys(key for setting in settings for key in setting))
    rows = [tuple(_cell(str(setting.get(column, ""))) for column in columns) for setting in settings]
    return ["## Settings and where each came from", _table(tuple(columns), rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    shown = text if len(text) <= _ANSWER_CHARACTERS else text[:_ANSWER_CHARACTERS] + " …"
    plain = shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "<br>".join(plain.splitlines()) or "(empty)"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f} %"


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.0f} bytes" if unit == 0 else f"{count:,.1f} {_UNITS[unit]}"
