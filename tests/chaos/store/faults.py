"""A store that misbehaves once, at a chosen call, for the process that uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from finetune_trainer.store.errors import StorageUnavailable
from finetune_trainer.store.objects import ObjectInfo, ObjectStore

T = TypeVar("T")


class Killed(BaseException):
    """The process is gone: nothing may catch it, and it makes no further call."""


class Fault(StrEnum):
    """What happens at the chosen call."""

    KILLED_BEFORE = "killed before a call"
    KILLED_AFTER = "killed after a call"
    REFUSED = "call refused"
    ANSWER_LOST = "answer lost"
    LATE = "write that lands later"
    CUT = "upload cut"
    OVERTAKEN_BEFORE = "overtaken before a call"
    OVERTAKEN_AFTER = "overtaken after a call"


_WRITES = {"put", "put_if_absent", "delete"}


@dataclass
class Plan:
    """One fault at the first call from number `at` (from 0) on that it can happen to."""

    fault: Fault
    at: int
    fired: str | None = None
    """The call it happened to, once it has."""


class FaultyStore:
    """Passes every call on to the real store. One per process: a killed one never calls again.

    overtake: what another process does meanwhile. later: takes a write that is to land at another time.
    wrote: told of each write that has landed, with its key.
    """

    def __init__(
        self,
        real: ObjectStore,
        plan: Plan | None,
        overtake: Callable[[], None],
        later: Callable[[str, Callable[[], object]], None],
        wrote: Callable[[str], None],
    ) -> None:
        self.calls = 0
        self._real = real
        self._plan = plan
        self._overtake = overtake
        self._later = later
        self._wrote = wrote
        self._dead = False
        self._lock = threading.Lock()

    def uri(self, key: str) -> str:
        """The real one."""
        return self._real.uri(key)

    def put(self, key: str, data: bytes | Path) -> None:
        """As the real one; what lands later is what the file held at the time of the call."""
        held = data if isinstance(data, bytes) else data.read_bytes()
        cut = (lambda: self._real.put(key, held[: len(held) // 2])) if isinstance(data, Path) else None
        self._call("put", key, lambda: self._real.put(key, data), lambda: self._real.put(key, held), cut)

    def copy(self, source: str, key: str, sha256: str) -> bool:
        """As the real one, which says False and raises nothing."""
        try:
            return self._call("copy", key, lambda: self._real.copy(source, key, sha256))
        except StorageUnavailable:
            return False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """As the real one."""
        return self._call("put_if_absent", key, lambda: self._real.put_if_absent(key, data))

    def get(self, key: str, limit: int | None = None) -> bytes:
        """As the real one."""
        return self._call("get", key, lambda: self._real.get(key, limit))

    def download(self, key: str, path: Path) -> None:
        """As the real one."""
        self._call("download", key, lambda: self._real.download(key, path))

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        """As the real one."""
        return self._call("stream", key, lambda: self._real.stream(key, start))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the real one, as of one moment."""
        return iter(self._call("list", prefix, lambda: tuple(self._real.list(prefix))))

    def head(self, key: str) -> ObjectInfo:
        """As the real one."""
        return self._call("head", key, lambda: self._real.head(key))

    def delete(self, key: str) -> None:
        """As the real one."""
        self._call("delete", key, lambda: self._real.delete(key))

    def _call(
        self,
        name: str,
        key: str,
        do: Callable[[], T],
        do_later: Callable[[], object] | None = None,
        cut: Callable[[], None] | None = None,
    ) -> T:
        fault = self._due(name, key, cut is not None)
        if fault is Fault.KILLED_BEFORE:
            self._die()
        if fault is Fault.OVERTAKEN_BEFORE:
            self._overtake()
        if fault is Fault.REFUSED:
            raise StorageUnavailable("the call was refused")
        if fault is Fault.LATE:
            self._later(key, do_later or do)
            raise StorageUnavailable("no answer yet")
        if fault is Fault.CUT and cut is not None:
            cut()
            self._die()
        answer = do()
        if name in _WRITES:
            self._wrote(key)
        if fault is Fault.KILLED_AFTER:
            self._die()
        if fault is Fault.ANSWER_LOST:
            raise StorageUnavailable("the answer was lost")
        if fault is Fault.OVERTAKEN_AFTER:
            self._overtake()
        return answer

    def _due(self, name: str, key: str, is_file: bool) -> Fault | None:
        with self._lock:
            if self._dead:
                raise Killed
            number, self.calls = self.calls, self.calls + 1
            plan = self._plan
            if plan is None or plan.fired is not None or number < plan.at:
                return None
            if (plan.fault is Fault.LATE and name not in _WRITES) or (plan.fault is Fault.CUT and not is_file):
                return None
            plan.fired = f"{name} {key}"
            return plan.fault

    def _die(self) -> None:
        self._dead = True
        raise Killed
