"""SIGTERM and SIGINT become a fact that the main flow looks at; blocking work is left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


_LOOK_SECONDS = 0.05
# How much of the stop budget the last checkpoint may take before a guard's change, whose few requests need the rest.
_SETTLE_SHARE = 0.8


class StopSignal:
    """Whether and when the process was first asked to stop."""

    def __init__(self) -> None:
        self.time: float | None = None
        """Monotonic time of the first signal; None before it."""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.time is not None

    def install(self) -> None:
        """From now on SIGTERM and SIGINT are only noted. Only the main thread may call this."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        if self.time is None:
            self.time = time.monotonic()


def settle_limit(begun: float, stop: float | None, budget: float) -> float:
    """Monotonic time up to which the last checkpoint goes before a guard's change, where its upload begins at `begun`.

    0.8 of the stop budget, or half of what the end of the workers has left of it. stop: when a stop was asked for; None:
    the budget counts from `begun`.
    """
    asked = begun if stop is None else stop
    return max(asked + _SETTLE_SHARE * budget, (begun + asked + budget) / 2)


class OutOfTime(Exception):
    """A blocking action was left behind because its time was over."""


def run_until(give_up: Callable[[], bool], action: Callable[[], T]) -> T:
    """What action returns or raises; OutOfTime as soon as give_up says so while it runs.

    action runs in a thread of its own and is left behind then, so the process has to end soon after, by `os._exit`:
    a transfer in flight cannot be interrupted from outside.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(action())
        except BaseException as raised:  # handed to the caller's thread whatever it is
            error.append(raised)

    thread = threading.Thread(target=work, name="blocking", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
        if thread.is_alive() and give_up():
            raise OutOfTime
    if error:
        raise error[0]
    return result[0]
