"""How an attempt ended, and how that is told: termination message and exit code."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.documents import Spent, TerminationMessage
from finetune_api.failures import TABLE, FinetuneError
from finetune_api.guards import MAX_STEP, RollbackReason
from finetune_trainer.agent.redaction import Redactor

SUCCEEDED = "Succeeded"
STOPPED = "Stopped"
REQUIREMENT_NOT_MET = "RequirementNotMet"
ROLLED_BACK = "RolledBack"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MESSAGE_CHARACTERS = 2048
"""A longer message is cut."""
_FIELD_CHARACTERS = 256


@dataclass(frozen=True)
class Alarm:
    """Why the loss of a run went wrong, and the first step whose loss was too high."""

    reason: RollbackReason
    onset_step: int


def read_alarm(told: Mapping[str, Any]) -> Alarm | None:
    """The alarm in what a worker or another node tells of its end; None if there is none that makes sense."""
    step, reason = told.get("onsetStep"), told.get("reason")
    if not isinstance(step, int) or not 0 < step <= MAX_STEP or reason not in set(RollbackReason):
        return None
    return Alarm(RollbackReason(reason), step)


@dataclass(frozen=True)
class End:
    """The end of an attempt: `Succeeded` or a row of the failure table, with what a person needs to know.

    alarm: where the loss went wrong, of LossSpike and NonFiniteLoss.
    """

    outcome: str
    message: str = ""
    field: str | None = None
    alarm: Alarm | None = None

    @property
    def exit_code(self) -> int:
        """0, or the row's exit code; a class that no process ends with becomes Internal's code."""
        if self.outcome == SUCCEEDED:
            return 0
        code = TABLE[self.outcome].exit_code
        return code if code is not None else 101


def from_error(error: BaseException) -> End:
    """The end that an error of the agent itself means; what is not in the table is Internal, with its traceback."""
    if isinstance(error, FinetuneError):
        return End(error.failure_class, str(error), error.field)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return End("DiskFull", f"cannot write {error.filename or 'a file'}: {error.strerror}.")
    lines = traceback.format_exception(error)
    return End("Internal", f"{type(error).__name__}: {error}\n" + keep_end("".join(lines), 1500))


def keep_end(text: str, characters: int) -> str:
    """The last characters of text, with a mark where something was cut."""
    return text if len(text) <= characters else "…" + text[-(characters - 1) :]


def termination_message(
    end: End,
    redactor: Redactor,
    *,
    step: int | None = None,
    checkpoint_step: int | None = None,
    artifact: str | None = None,
    base_eval_loss: float | None = None,
    eval_loss: float | None = None,
    resumed_from_step: int | None = None,
    spent: Spent | None = None,
) -> bytes:
    """At most 4,096 bytes without a secret: what goes into the termination log."""
    message = redactor.text(end.message)
    if len(message) > MESSAGE_CHARACTERS:
        message = message[: MESSAGE_CHARACTERS - 1] + "…"
    return TerminationMessage(
        outcome=end.outcome,
        message=message,
        field=end.field[:_FIELD_CHARACTERS] if end.field else None,
        step=step,
        checkpoint_step=checkpoint_step,
        artifact=artifact,
        base_eval_loss=base_eval_loss,
        eval_loss=eval_loss,
        resumed_from_step=resumed_from_step,
        spent=spent,
    ).encode()


def write_termination_log(path: Path, message: bytes) -> None:
    """The message is in path. Not by renaming: in a pod path is a mount of its own."""
    path.write_bytes(message)
