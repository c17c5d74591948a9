"""`--worker-module tests.chaos.relay`: stands for a worker that the zygote forks, from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from tests.chaos.zygote import SOCKET_VARIABLE, STACKS

_MAX_ANSWER_BYTES = 64
_ZYGOTE_IS_GONE = 70


def main() -> int:
    """The worker's exit code; ends by the same signal where the worker did."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the worker does
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[SOCKET_VARIABLE])
        signal.signal(signal.SIGUSR1, lambda _number, _frame: connection.send(STACKS))
        request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": str(Path.cwd())}
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        answer = connection.recv(_MAX_ANSWER_BYTES)
    if not answer:
        return _ZYGOTE_IS_GONE
    status = int(answer)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
