"""A page about a failed attempt, for whoever looks for the cause. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import indent

from finetune_api.documents import ProgressDocument
from finetune_api.failures import TABLE
from finetune_trainer.agent.ending import End

# faulthandler and the traceback module head a stack alike, but for the order of its frames.
_HEADER = re.compile(r"\(most recent call (first|last)\):$")
_FRAME = '  File "'
_METRICS = ("loss", "evalLoss", "gradNorm", "learningRate", "tokensPerSecond")


def failure_report(end: End, document: ProgressDocument, logs: Mapping[int, str]) -> str:
    """Markdown: class, message, how far the run was, its last metrics, and the stacks of every rank in logs.

    logs: the end of what each rank printed. Secrets are the caller's to take out.
    """
    told = document.to_json()
    facts = {
        "Class": f"{end.outcome}, exit code {end.exit_code}",
        "Field to change": end.field or "none",
        "Stage": document.stage.value,
        "Step": f"{document.step} of {document.total_steps}",
        "Newest stored checkpoint": "none" if document.checkpoint_step is None else f"step {document.checkpoint_step}",
        **{name: f"{told[name]:.6g}" for name in _METRICS if name in told},
    }
    page = [
        f"# Attempt {document.attempt} ended as {end.outcome}\n",
        f"{TABLE[end.outcome].summary} {TABLE[end.outcome].hint}\n",
        _verbatim(end.message),
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "\n## Stacks\n",
    ]
    for rank, log in sorted(logs.items()):
        found = stacks(log)
        page += [f"### Rank {rank}\n", _verbatim(found) if found else f"None; rank-{rank}.log has what it printed.\n"]
    return "\n".join(page)


def stacks(log: str) -> str:
    """The stacks and tracebacks in what a worker printed, each with its header; empty where there is none."""
    kept: list[str] = []
    order = ""  # of the stack that is being read
    for line in log.splitlines():
        header = _HEADER.search(line)
        if header is not None:
            order = header[1]
        elif not line.startswith(_FRAME) and not (order and line.startswith(" ")):
            # The line after the last frame of a traceback names the error.
            order, named = "", order == "last"
            if not named:
                continue
        kept.append(line)
    return "\n".join(kept)


def _verbatim(text: str) -> str:
    return indent(text.strip("\n"), "    ", lambda _: True) + "\n"
