"""What workers print: passed on line by line, and its end remembered for the message."""

from __future__ import annotations

import threading
from collections import deque
from typing import BinaryIO

_TAIL_LINES = 60
_LONGEST_LINE = 16 * 1024
_WRITING = threading.Lock()


class OutputPump(threading.Thread):
    """Copies one stream of one worker to a sink, each line with prefix before it."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, prefix: str) -> None:
        super().__init__(name="output", daemon=True)
        self._source = source
        self._sink = sink
        self._prefix = prefix.encode()
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)

    def run(self) -> None:
        """Ends when the worker and all that inherited its stream have closed it."""
        with self._source:
            while line := self._source.readline(_LONGEST_LINE):
                line = line if line.endswith(b"\n") else line + b"\n"
                self._tail.append(line)
                with _WRITING:
                    self._sink.write(self._prefix + line)
                    self._sink.flush()

    def tail(self) -> str:
        """The last lines."""
        return b"".join(list(self._tail)).decode(errors="replace")
