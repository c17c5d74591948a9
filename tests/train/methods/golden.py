"""Reading, running and writing of golden curves."""

from __future__ import annotations

from pathlib import Path

from tests.train.methods.case import Case

FOLDER = Path(__file__).parent / "curves"


def curve(case: Case, root: Path) -> list[tuple[int, float]]:
    """(step, training loss) of each step of the case, run in a worker process at root."""
    work = case.work(root)
    codes = work.train()
    assert codes == [0] * work.run.world_size, work.logged()
    return [(line["step"], line["loss"]) for line in work.metrics() if "loss" in line]


def read_golden(name: str) -> list[tuple[int, float]]:
    """The checked-in curve of a case."""
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return [(int(step), float(loss)) for step, loss in (line.split() for line in lines)]


def write_golden(case: Case, root: Path) -> None:
    """Run the case and write its curve; floats are written so that they read back bit-equal."""
    lines = [f"{step} {loss!r}\n" for step, loss in curve(case, root)]
    (FOLDER / f"{case.name}.txt").write_text("".join(lines))
