"""The worker process: set the stage, train, and end with the exit code of the failure table."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from finetune_api.failures import TABLE, FinetuneError
from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.worker.heartbeat import Heartbeat
from finetune_trainer.worker.log import open_log
from finetune_trainer.worker.ranks import Ranks

# Nothing is loaded from the network, and no file that is loaded may run code.
_ENVIRONMENT = {
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def main(argv: Sequence[str]) -> int:
    """Run one worker; returns the exit code: 0, or that of the failure's class with an error file beside it."""
    parser = argparse.ArgumentParser(prog="finetune_trainer.worker", description="One training process of the gang.")
    parser.add_argument("--run-file", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args(argv)
    ranks = Ranks.from_environment()
    work = WorkDir(options.work)
    work.state.mkdir(parents=True, exist_ok=True)
    log = open_log(rank=ranks.rank)
    _take_over_process()
    try:
        run = _read(options.run_file)
        heartbeat = Heartbeat(work.heartbeat(ranks.rank), work.times if ranks.is_node_main else None)
        with heartbeat.long_phase():  # importing the libraries takes most of a small run
            from finetune_trainer.worker.train import train
        train(run, work, ranks, heartbeat, log)
    except Exception as error:
        return _fail(error, work, ranks.rank, log)
    return 0


def _take_over_process() -> None:
    """Ignore SIGTERM (the agent asks by the stop file) and print all stacks on SIGUSR1."""
    os.environ.update(_ENVIRONMENT)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)  # between libraries; nobody who reads a pod's log can mend them
    for library in ("accelerate", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def _read(path: Path) -> RunFile:
    try:
        return RunFile.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise FinetuneError(f"The run file {path.name} cannot be read: {error}", failure_class="InvalidSpec") from error


def _fail(error: Exception, work: WorkDir, rank: int, log: object) -> int:
    from finetune_trainer.worker.faults import classify

    fault = classify(error)
    if fault.failure_class != "Stopped":
        traceback.print_exception(error)
    fault.write(work.state / f"error-{rank}.json")
    log.info("worker-ended", failure=fault.failure_class, message=fault.message, field=fault.field)  # type: ignore[attr-defined]
    code = TABLE[fault.failure_class].exit_code
    assert code is not None, f"{fault.failure_class} is not a class that a process ends with"
    return code
