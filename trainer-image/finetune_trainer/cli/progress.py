"""The run's progress for a person: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from finetune_api.documents import ProgressDocument, Stage

_LINE_SECONDS = 5.0


class Display(Protocol):
    """Shows progress documents as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, document: ProgressDocument) -> None:
        """Show the newest document."""


def open_display(console: Console) -> Display:
    """A bar where the console is a terminal, else plain lines."""
    return BarDisplay(console) if console.is_terminal else LineDisplay(console)


def describe(document: ProgressDocument) -> str:
    """Loss, speed and remaining time, as far as they are known: "loss 1.234  567 tokens/s  ETA 2m04s"."""
    parts = []
    if document.loss is not None:
        parts.append(f"loss {document.loss:.3f}")
    if document.eval_loss is not None:
        parts.append(f"eval loss {document.eval_loss:.3f}")
    if document.tokens_per_second is not None:
        parts.append(f"{document.tokens_per_second:,.0f} tokens/s")
    if document.eta_seconds is not None and document.stage is Stage.TRAINING:
        parts.append(f"ETA {duration(document.eta_seconds)}")
    return "  ".join(parts)


def duration(seconds: int) -> str:
    """ "45s", "2m04s" or "3h07m"."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class BarDisplay:
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("Starting", total=1, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, document: ProgressDocument) -> None:
        """Redraw the bar."""
        self._bar.update(
            self._task,
            description=document.stage.value,
            total=max(1, document.total_steps),
            completed=document.step,
            facts=describe(document),
        )


class LineDisplay:
    """A line when the stage changes, and every few seconds when the step does."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Stage | None = None
        self._step = -1
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, document: ProgressDocument) -> None:
        """Print a line if there is something new to say."""
        now = time.monotonic()
        moved = document.step != self._step and now - self._last >= _LINE_SECONDS
        if document.stage == self._stage and not moved:
            return
        self._stage, self._step, self._last = document.stage, document.step, now
        steps = f" {document.step}/{document.total_steps}" if document.total_steps else ""  # an evaluation has none
        line = f"{document.stage.value}{steps}  {describe(document)}".rstrip()
        self._console.print(line, highlight=False, soft_wrap=True)
