"""`python -m finetune_trainer.preflight`: the preflight pod's program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from finetune_api import naming
from finetune_api.runfile import PreflightFile
from finetune_api.status import Finding, Preflight
from finetune_trainer.preflight.document import INFO, encode_preflight, exit_code
from finetune_trainer.preflight.run import run_preflight


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the job of --file, write the termination message, and return the exit code."""
    parser = argparse.ArgumentParser(prog="finetune-preflight", description="Check model, data and output of a job.")
    parser.add_argument("--file", type=Path, default=Path(naming.PREFLIGHT_FILE_PATH), help="the preflight file")
    parser.add_argument(
        "--termination-log", type=Path, default=Path(naming.TERMINATION_LOG), help="where the preflight document goes"
    )
    options = parser.parse_args(arguments)
    log = _logger()
    result = _check(options.file, log)
    for item in result.findings:
        write = log.info if item.failure_class == INFO else log.error
        write("finding", failure_class=item.failure_class, field=item.field, message=item.message)
    code = exit_code(result)
    log.info("preflight", ok=result.ok, findings=len(result.findings), exit_code=code)
    try:
        options.termination_log.write_bytes(encode_preflight(result))
    except OSError as error:
        log.error("termination_message", path=str(options.termination_log), error=error.strerror)
    return code


def _check(path: Path, log: Any) -> Preflight:
    try:
        file = PreflightFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        return _unreadable(path, error)
    log.info(
        "start",
        job=file.job.name,
        namespace=file.job.namespace,
        model=file.model.uri,
        sources=[source.uri for source in file.sources],
        output=file.output.uri,
    )
    return run_preflight(file, os.environ)


def _unreadable(path: Path, error: OSError | ValidationError) -> Preflight:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        why = f"{'.'.join(str(part) for part in first['loc']) or 'document'}: {first['msg']}"
    else:
        why = error.strerror or type(error).__name__
    problem = Finding(failure_class="InvalidSpec", message=f"The preflight file {path} cannot be read: {why}.")
    return Preflight(ok=False, spec_digest="", findings=[problem], findings_total=1)


def _logger() -> Any:
    renderer: Any = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A check that was given up still waits for its endpoint; a plain exit would wait for it too.
    os._exit(status)
