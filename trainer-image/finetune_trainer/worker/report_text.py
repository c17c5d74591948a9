"""The report for people: report.md, and the curve beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ANSWER_CHARACTERS = 600


def render_report(report: dict[str, Any]) -> str:
    """Markdown of the report."""
    job, lineage = report["job"], report["lineage"]
    revision = f" at revision `{lineage['baseModelRevision']}`" if lineage["baseModelRevision"] else ""
    parts = [
        f"# {job['namespace']}/{job['name']}",
        f"{report['tuning']['type']} of `{lineage['baseModel']}`{revision}, {report['objective']['type']}, "
        f"{report['training']['steps']} steps. The result is in `{report['artifact']}/`"
        + (", merged into the base in `merged/`." if report["merged"] else "."),
        "## Before and after",
        *_evaluation(report["evaluation"]),
        "![Loss curve](loss.png)",
        *_answers(report["answers"]),
        "## Parameters",
        _parameters(report["parameters"]),
        "## Where it comes from",
        _table(
            ("What", "Value"),
            [
                ("Base model", f"`{lineage['baseModel']}`{revision}"),
                ("Base model digest", f"`{lineage['baseModelDigest']}`"),
                ("Data", ", ".join(f"`{uri}`" for uri in lineage["datasets"])),
                ("Data digest", f"`{lineage['datasetDigest']}`"),
                ("Run file digest", f"`{lineage['runFileDigest']}`"),
                ("Tokens trained on", f"{report['training']['tokens']:,}"),
                ("Time in training", f"{report['training']['seconds']:,} s"),
                ("Libraries", ", ".join(f"{name} {number}" for name, number in lineage["libraries"].items())),
            ],
        ),
        *_settings(report["settings"]),
    ]
    return "\n\n".join(parts) + "\n"


def _evaluation(evaluation: dict[str, Any]) -> list[str]:
    if evaluation["loss"] is None:
        return ["No records were held out, so nothing was measured. Set dataset.validation to compare."]
    rows = [
        (name, _number(evaluation[base]), _number(evaluation[tuned]), _percent(evaluation[change]))
        for name, base, tuned, change in (
            ("Loss", "baseLoss", "loss", "lossChangePercent"),
            ("Perplexity", "basePerplexity", "perplexity", "perplexityChangePercent"),
        )
    ]
    return [
        f"On {evaluation['records']} held-out records, each counted token weighing the same:",
        _table(("", "Base", "Tuned", "Change"), rows),
    ]


def _answers(answers: list[dict[str, str]]) -> list[str]:
    if not answers:
        return []
    rows = [tuple(_cell(answer[key]) for key in ("prompt", "reference", "base", "tuned")) for answer in answers]
    return ["## Answers side by side", _table(("Prompt", "Reference", "Base", "Tuned"), rows)]


def _parameters(parameters: dict[str, Any]) -> str:
    text = (
        f"{parameters['total']:,} in all, {parameters['trainable']:,} of them trained "
        f"({parameters['trainableShare']:.2%})"
    )
    quantised = f", {parameters['quantised']:,} held in 4 bits ({parameters['quantisedShare']:.1%})"
    return text + (quantised if parameters["quantised"] else "") + "."


def _settings(settings: list[dict[str, Any]]) -> list[str]:
    if not settings:
        return []
    columns = list(dict.fromkeys(key for setting in settings for key in setting))
    rows = [tuple(_cell(str(setting.get(column, ""))) for column in columns) for setting in settings]
    return ["## Settings and where each came from", _table(tuple(columns), rows)]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    shown = text if len(text) <= _ANSWER_CHARACTERS else text[:_ANSWER_CHARACTERS] + " …"
    plain = shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "<br>".join(plain.splitlines()) or "(empty)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f} %"


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Write the loss curve: training loss per step, and the held-out loss where it was measured."""
    # Imported at the end only: it costs about a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("evalLoss", "held out", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
