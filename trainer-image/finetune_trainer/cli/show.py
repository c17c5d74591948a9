"""What a person sees before and after the run: findings, plan, result."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune_api.documents import TerminationMessage
from finetune_api.failures import TABLE
from finetune_api.job import ObjectiveType, Task
from finetune_api.planner import Planned
from finetune_api.runfile import RunFile
from finetune_api.status import Finding, Preflight
from finetune_trainer.cli.jobfile import line_of
from finetune_trainer.cli.preparing import LocalJob

_INFO = "Info"
_MIB = 2**20
REPORT = "report"
"""What the agent calls the artifact of a run that made no model."""
_LIKELIHOODS = (Task.CAUSAL_LM, Task.SEQ2SEQ, Task.MASKED_LM)


def show_notes(console: Console, local: LocalJob) -> None:
    """Each thing of the file that counts in a cluster only."""
    for note in local.notes:
        console.print(f"[dim]note:[/dim] {escape(note)}", soft_wrap=True)


def show_preflight(console: Console, preflight: Preflight, file: Path) -> None:
    """What preflight found about model and data, and its findings with their lines in the job's file."""
    model, data = preflight.model, preflight.data
    if model is not None:
        weights = f"{model.weight_bytes / _MIB:,.1f} MiB of weights" if model.weight_bytes else "made from its config"
        facts = [f"{model.parameters / 1e6:,.1f} M parameters", weights]
        facts += [f"{model.experts} experts"] if model.experts else []
        facts += [f"quantised by {model.quantization}"] if model.quantization else []
        console.print(f"Model: {escape(model.model_type)}, {escape(', '.join(facts))}", soft_wrap=True)
    if data is not None:
        bad = f", {data.bad_rows} that cannot be used" if data.bad_rows else ""
        console.print(
            f"Data: {data.rows:,} records{bad}, about {data.tokens:,} tokens, format {data.format} "
            f"({escape(data.format_reason)})",
            soft_wrap=True,
        )
    for place, size in preflight.further_weight_bytes.items():
        console.print(f"{escape(place.removesuffix('.uri'))}: {size / _MIB:,.1f} MiB of weights", soft_wrap=True)
    for finding in preflight.findings:
        show_finding(console, finding, file)
    hidden = preflight.findings_total - len(preflight.findings)
    if hidden > 0:
        console.print(f"and {hidden} more findings")


def show_finding(console: Console, finding: Finding, file: Path) -> None:
    """One finding with the field to change and what to do."""
    if finding.failure_class == _INFO:
        console.print(f"[dim]remark:[/dim] {escape(finding.message)}", soft_wrap=True)
        return
    show_failure(console, finding.failure_class, finding.message, finding.field, file)


def show_failure(console: Console, name: str, message: str, field: str | None, file: Path) -> None:
    """The class of a failure, what happened, the field with its line in the job's file, and what to do."""
    console.print(f"[bold red]{escape(name)}[/bold red]: {escape(message)}", soft_wrap=True)
    if field:
        line = line_of(file, field)
        place = f" ({file}:{line})" if line is not None else ""
        console.print(f"  field: {escape(field)}{escape(place)}", highlight=False, soft_wrap=True)
    if name in TABLE:
        console.print(f"  what to do: {escape(TABLE[name].hint)}", soft_wrap=True)


_FIRST = (
    "dataset.format",
    "hyperparameters.learningRate",
    "hyperparameters.epochs",
    "hyperparameters.precision",
    "hyperparameters.maxSequenceLength",
    "hyperparameters.packing",
)
"""What a person who starts a run looks at first."""


def show_plan(console: Console, planned: Planned, *, whole: bool = True) -> None:
    """The plan as a table: each setting, its value and why; or the first of them, and how to see the others."""
    plan, run = planned.plan, planned.run
    table = Table(title=escape(f"Plan: {_method(run)} {run.model.source.uri}"), title_justify="left")
    for name in ("setting", "value", "why"):
        table.add_column(name, overflow="fold")
    processes = f"{plan.gpus_per_node} process{'es' if plan.gpus_per_node > 1 else ''}"
    table.add_row("pool", f"{plan.pool} ({escape(run.resources.accelerator)}), {processes}", escape(plan.pool_reason))
    table.add_row(
        "steps",
        str(plan.total_steps),
        f"micro batch {plan.micro_batch_size}, accumulation "
        f"{plan.gradient_accumulation}, {run.global_batch_size} records per step",
    )
    table.add_row("memory", f"{plan.memory.total_gib:.2f} GiB", "estimated peak of one process")
    shown = [setting for setting in plan.settings if whole or setting.name in _FIRST]
    for setting in shown:
        table.add_row(escape(setting.name), escape(_short(setting.value)), escape(setting.reason))
    table.add_row("output.uri", escape(run.output.target.uri), "set by the job")
    console.print(table)
    if more := len(plan.settings) - len(shown):
        console.print(f"{more} more settings and their reasons: finetune plan, or the report", highlight=False)


def _method(run: RunFile) -> str:
    """What is done, in words that end before the model's URI."""
    kind = run.objective.type
    if kind is ObjectiveType.EVALUATION:
        return "Evaluation of"
    by = "" if kind is ObjectiveType.SUPERVISED else f"{kind.value} by "
    return f"{by}{run.tuning.type.value} of"


def show_result(console: Console, run: RunFile, message: TerminationMessage) -> None:
    """The loss before and after (of an evaluation, the one that there is), and where the artifact is."""
    console.print(
        f"[bold green]Succeeded[/bold green]: {escape(message.message or 'the artifact is published')}", soft_wrap=True
    )
    before, after = message.base_eval_loss, message.eval_loss
    evaluates = run.objective.type is ObjectiveType.EVALUATION
    if evaluates and (found := after if after is not None else before) is not None:
        console.print(f"Loss: {found:.4f}", highlight=False)
    elif before is not None and after is not None:
        console.print(_comparison(before, after, likelihood=run.model.task in _LIKELIHOODS and _predicts_text(run)))
    show_places(console, run, message)


def show_places(console: Console, run: RunFile, message: TerminationMessage) -> None:
    """Where the artifact and the report are; nothing where the run left none."""
    if message.artifact is None:
        return
    output = run.output.target.uri
    place = unquote(output.removeprefix("file://")) if output.startswith("file://") else output
    if message.artifact != REPORT:
        console.print(f"Artifact: {place}/{message.artifact}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report:   {place}/report.md", markup=False, highlight=False, soft_wrap=True)


def _comparison(before: float, after: float, *, likelihood: bool) -> Table:
    table = Table(title="Evaluation on held-out records", title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name)
    table.add_row("loss", f"{before:.4f}", f"{after:.4f}", _change(before, after))
    if likelihood:
        perplexities = (_perplexity(before), _perplexity(after))
        table.add_row("perplexity", *(f"{value:.2f}" for value in perplexities), _change(*perplexities))
    return table


def _predicts_text(run: RunFile) -> bool:
    """Whether the loss is that of the next or of a hidden token, so that its exponential says something."""
    return run.objective.type in (ObjectiveType.SUPERVISED, ObjectiveType.PRETRAIN)


def _perplexity(loss: float) -> float:
    # exp overflows from 710 on; no one reads a perplexity of that size.
    return math.exp(min(loss, 700.0))


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _short(value: object) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
