"""From an exception to a row of the failure table, and to the error file."""

from __future__ import annotations

import errno
import json
import pickle
import traceback
from dataclasses import dataclass
from pathlib import Path

from finetune_api.failures import FinetuneError
from finetune_trainer.agent.workdir import write_whole
from finetune_trainer.worker.guards import LossAlarm

_TRACEBACK_CHARACTERS = 4000
_COLLECTIVE_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group")


class Stopped(FinetuneError):
    """The run was asked to stop and did, after a checkpoint if it had made a step."""

    failure_class = "Stopped"


@dataclass(frozen=True)
class Fault:
    """What goes into the error file. onset_step, reason: of a LossAlarm."""

    failure_class: str
    message: str
    field: str | None
    traceback: str
    onset_step: int | None = None
    reason: str | None = None

    def write(self, path: Path) -> None:
        """The error file as the agent reads it."""
        write_whole(
            path,
            json.dumps(
                {
                    "class": self.failure_class,
                    "message": self.message,
                    "field": self.field,
                    "traceback": self.traceback,
                    "onsetStep": self.onset_step,
                    "reason": self.reason,
                }
            ),
        )


def classify(error: BaseException) -> Fault:
    """The class and message of error; what the table does not know is Internal with the traceback's end."""
    trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    if isinstance(error, LossAlarm):
        return Fault(error.failure_class, str(error), error.field, trace, error.onset_step, error.reason)
    if isinstance(error, FinetuneError):
        return Fault(error.failure_class, str(error), error.field, trace)
    name, message, field = _known(error)
    return Fault(name, message, field, trace)


def _known(error: BaseException) -> tuple[str, str, str | None]:
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "OutOfGpuMemory",
            f"The GPU ran out of memory: {_first_line(text)}",
            "spec.hyperparameters.microBatchSize",
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in text:
        return "OutOfHostMemory", f"The worker ran out of host memory: {_first_line(text)}", None
    if isinstance(error, pickle.UnpicklingError):
        return (
            "UnsafeFile",
            (f"A file of the checkpoint was refused, because loading it could run code: {_first_line(text)}"),
            None,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "DiskFull", f"The scratch disk is full: {text}", None
    is_distributed = isinstance(error, getattr(torch.distributed, "DistError", ()))
    if is_distributed or (isinstance(error, RuntimeError) and any(w in text.lower() for w in _COLLECTIVE_WORDS)):
        return "CollectiveFailed", f"The worker lost contact with the others: {_first_line(text)}", None
    return "Internal", f"{type(error).__name__}: {_first_line(text)}", None


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:500]
