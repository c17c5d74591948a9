"""Which row of the failure table explains the end of the workers. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.failures import TABLE, by_exit_code
from finetune_trainer.agent.ending import STOPPED, End, keep_end, read_alarm
from finetune_trainer.agent.gang import Exit

_COLLECTIVE = "CollectiveFailed"
_NO_SPACE = "No space left on device"
_TAIL_CHARACTERS = 1200


def classify(
    exits: Sequence[Exit], errors: Mapping[int, Mapping[str, Any]], tails: Mapping[int, str], oom_kills: int
) -> End:
    """The end that the workers' failures mean.

    exits: in the order in which they were seen, with at least one that is a failure. errors: the content of
    error-<rank>.json. tails: the end of each rank's standard error. oom_kills: how often the kernel killed a process
    of the container for memory while the workers ran.

    The first failure wins. Losing contact with a rank is a consequence of that rank's end, which the survivors may
    report sooner than the dead rank can be reaped: so such a failure yields to any other.
    """
    own = [ended for ended in exits if ended.code != 0 and (not ended.by_agent or ended.rank in errors)]
    ends = [_explain(ended, errors.get(ended.rank), tails.get(ended.rank, ""), oom_kills) for ended in own]
    root = next((end for end in ends if end.outcome not in (_COLLECTIVE, STOPPED)), None)
    return root or ends[0]


def _explain(ended: Exit, error: Mapping[str, Any] | None, tail: str, oom_kills: int) -> End:
    rank = f"rank {ended.rank}"
    if error is not None:
        return _from_error_file(rank, error)
    end_of_log = f" The end of its log:\n{keep_end(tail.strip(), _TAIL_CHARACTERS)}" if tail.strip() else ""
    if ended.signal is not None:
        name = signal.Signals(ended.signal).name if ended.signal in set(signal.Signals) else str(ended.signal)
        if ended.signal == signal.SIGKILL and oom_kills > 0:
            return End("OutOfHostMemory", f"{rank} was killed by the kernel at the pod's memory limit.")
        return End("Internal", f"{rank} was ended by signal {name}.{end_of_log}")
    if _NO_SPACE in tail:
        return End("DiskFull", f"{rank} could not write to the scratch disk.{end_of_log}")
    row = by_exit_code(ended.code or 0)
    if row.exit_code is None:
        return End("Internal", f"{rank} ended with exit code {ended.code}.{end_of_log}")
    return End(row.name, f"{rank}: {row.summary}{end_of_log}")


def _from_error_file(rank: str, error: Mapping[str, Any]) -> End:
    name = error.get("class")
    message = str(error.get("message") or "").strip()
    field = error.get("field")
    field = field if isinstance(field, str) else None
    if not isinstance(name, str) or name not in TABLE:
        return End("Internal", f"{rank} failed with the unknown class {str(name)[:64]!r}: {message}", field)
    if TABLE[name].name == "Internal":
        trace = keep_end(str(error.get("traceback") or "").strip(), _TAIL_CHARACTERS)
        message = f"{message}\n{trace}" if trace else message
    return End(name, message or f"{rank}: {TABLE[name].summary}", field, read_alarm(error))
