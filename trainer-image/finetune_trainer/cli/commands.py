"""`finetune run` and `finetune plan`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from finetune_api.failures import TABLE, FinetuneError
from finetune_api.planner import Planned
from finetune_api.status import Preflight
from finetune_trainer.cli import preparing, show
from finetune_trainer.cli.jobfile import JobFileError, read_job_file
from finetune_trainer.cli.preparing import LocalJob
from finetune_trainer.cli.running import AgentProcess, Place, alone, follow

_USAGE = 2
_STOP_SECONDS = 120.0
_WIDTH = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or the failure table's; 2 for a wrong command line."""
    given = _parser().parse_args(arguments)
    console, errors = open_console(), open_console(stderr=True)
    try:
        return int(given.command(given, console))
    except JobFileError as error:
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.row.exit_code or _USAGE
    except FinetuneError as error:
        show.show_failure(errors, error.failure_class, str(error), error.field, given.file)
        return _exit_code(error.failure_class)
    except KeyboardInterrupt:
        errors.print("Stopped before the run began.")
        return TABLE["Stopped"].exit_code or _USAGE


def open_console(*, stderr: bool = False) -> Console:
    """The terminal; elsewhere, wide enough for a table whose words are not broken."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune", description="Run a FineTuneJob on this machine, without a cluster.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="run | plan")
    run = commands.add_parser("run", help="check, plan, train and publish", allow_abbrev=False)
    plan = commands.add_parser("plan", help="check and plan only", allow_abbrev=False)
    for command in (run, plan):
        command.add_argument("-f", "--file", type=Path, required=True, metavar="JOB.yaml", help="the FineTuneJob")
        command.add_argument("--output-dir", type=Path, metavar="DIR", help="a folder instead of output.uri")
    run.add_argument("--work", type=Path, metavar="DIR", help="folder for copies and logs (default: below ~/.cache)")
    run.add_argument(
        "--stop-budget",
        type=float,
        default=_STOP_SECONDS,
        metavar="SECONDS",
        help="how long a stop by Ctrl-C may take to save",
    )
    run.add_argument("--worker-module", help=argparse.SUPPRESS)  # the agent's test seam
    plan.add_argument("--offline", action="store_true", help="look only at what lies on this machine")
    run.set_defaults(command=_run)
    plan.set_defaults(command=_plan)
    return parser


def _run(given: argparse.Namespace, console: Console) -> int:
    local = _localise(given, console)
    preflight = preparing.check(local, os.environ)
    planned, code = _planned(local, preflight, console, whole=False)
    if planned is None:
        return code
    place = Place(preparing.at_work(local, given.work, os.environ))
    with alone(place):
        console.print(f"Log: {place.log}", highlight=False, soft_wrap=True)
        agent = AgentProcess(planned.run, place, os.environ, given.stop_budget, given.worker_module)
        code = follow(agent, console)
    return _conclude(code, agent, planned, place, given.file, console)


def _plan(given: argparse.Namespace, console: Console) -> int:
    local = _localise(given, console)
    if not given.offline:
        return _planned(local, preparing.check(local, os.environ), console)[1]
    with tempfile.TemporaryDirectory() as scratch:
        preflight, skipped = preparing.check_offline(local, os.environ, Path(scratch) / "output")
    code = 0
    if preflight is not None:
        code = _planned(local, preflight, console)[1]
    for line in skipped:
        console.print(f"offline: {line}", markup=False, highlight=False, soft_wrap=True)
    return code


def _localise(given: argparse.Namespace, console: Console) -> LocalJob:
    local = preparing.localise(read_job_file(given.file), given.output_dir, os.environ)
    show.show_notes(console, local)
    return local


def _planned(
    local: LocalJob, preflight: Preflight, console: Console, *, whole: bool = True
) -> tuple[Planned | None, int]:
    """The plan, shown (whole, or its main settings); without one the exit code of preflight's first finding."""
    show.show_preflight(console, preflight, local.file.path)
    if not preflight.ok:
        return None, _exit_code(preflight.findings[0].failure_class)
    planned = preparing.plan(local, preflight)
    show.show_plan(console, planned, whole=whole)
    return planned, 0


def _conclude(code: int, agent: AgentProcess, planned: Planned, place: Place, file: Path, console: Console) -> int:
    message = agent.last_words()
    if code == 0:
        show.show_result(console, planned.run, message)
        return 0
    outcome = message.outcome
    if outcome == "Stopped":
        console.print(f"{message.message} Run the same command again to go on.", markup=False, soft_wrap=True)
        return code
    show.show_failure(console, outcome, message.message, message.field, file)
    show.show_places(console, planned.run, message)
    console.print(f"  log: {place.log}", highlight=False, soft_wrap=True)
    # A negative code is the signal that killed the agent.
    return code if code > 0 else _exit_code("Internal")


def _exit_code(name: str) -> int:
    """The class's exit code; InvalidSpec's for a class that no process in a pod ends with."""
    code = TABLE[name].exit_code if name in TABLE else None
    return code if code is not None else TABLE["InvalidSpec"].exit_code or _USAGE
