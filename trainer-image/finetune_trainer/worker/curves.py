"""The curves of a run as pictures, beside the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OWN_PICTURE = (
    ("learningRate", "Learning rate", "learning-rate.png"),
    ("gradNorm", "Gradient norm before clipping", "gradient-norm.png"),
    ("tokensPerSecond", "Tokens per second", "tokens-per-second.png"),
)
_NOT_DRAWN = {"step", "epoch", "loss", "evalLoss", *(name for name, _, _ in _OWN_PICTURE)}

Points = list[tuple[int, float]]


def draw_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Write a PNG for each figure that the history has; returns (title, file name) of each, the loss first.

    The training loss and the held-out one share a picture, as does any other figure with its held-out twin: `reward`
    and `evalReward`.
    """
    pictures: list[tuple[str, str, dict[str, Points]]] = [
        ("Loss", "loss.png", {"training": _points(history, "loss"), "held out": _points(history, "evalLoss")})
    ]
    pictures += [(title, file, {"": _points(history, name)}) for name, title, file in _OWN_PICTURE]
    for name in _further(history):
        twin = "eval" + name[0].upper() + name[1:]
        points = {"training": _points(history, name), "held out": _points(history, twin)}
        pictures.append((name, f"{name}.png", points))
    drawn = []
    for title, file, lines in pictures:
        if any(lines.values()):
            _draw(title, lines, folder / file)
            drawn.append((title, file))
    return drawn


def _further(history: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for entry in history for name in entry if name not in _NOT_DRAWN)
    plain = {name[4].lower() + name[5:] if name.startswith("eval") and len(name) > 4 else name: None for name in names}
    return [name for name in plain if name not in _NOT_DRAWN and name.isalnum()]


def _points(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def _draw(title: str, lines: Mapping[str, Points], path: Path) -> None:
    # Imported at the end only: it costs about a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in lines.items():
        if points:
            style = "o--" if label == "held out" else "-" if len(points) > 1 else "o"
            axes.plot(*zip(*points, strict=True), style, label=label or title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
