"""What workers print: passed on line by line, and its end remembered for the message."""

from __future__ import annotations

import threading
from collections import deque
from typing import BinaryIO

_LONGEST_LINE = 16 * 1024
_WRITING = threading.Lock()


class Tail:
    """The last lines of what was added, at most `limit` bytes. Several threads may add."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._lock = threading.Lock()

    def add(self, line: bytes) -> None:
        """Remember line, and forget the oldest ones that are too many."""
        with self._lock:
            self._lines.append(line)
            self._size += len(line)
            while self._size > self._limit:
                self._size -= len(self._lines.popleft())

    def text(self) -> str:
        """The lines as they are now."""
        with self._lock:
            return b"".join(self._lines).decode(errors="replace")


class OutputPump(threading.Thread):
    """Copies one stream of one worker to a sink, each line with prefix before it, and to tails without it."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, prefix: str, *tails: Tail) -> None:
        super().__init__(name="output", daemon=True)
        self._source = source
        self._sink = sink
        self._prefix = prefix.encode()
        self._tails = tails

    def run(self) -> None:
        """Ends when the worker and all that inherited its stream have closed it."""
        with self._source:
            while line := self._source.readline(_LONGEST_LINE):
                line = line if line.endswith(b"\n") else line + b"\n"
                for tail in self._tails:
                    tail.add(line)
                with _WRITING:
                    self._sink.write(self._prefix + line)
                    self._sink.flush()
