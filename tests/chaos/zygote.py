"""Workers that are forked from a process with the libraries loaded: 20 ms instead of 10 s for each start.

The agent starts `tests.chaos.relay` as its worker module. The relay asks the zygote for a worker and stands for it:
what the worker writes goes to the relay's streams, its end becomes the relay's end, and the relay's end is its end.
Between them is a keeper, forked from the zygote for each worker, which can wait for both.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
SOCKET_VARIABLE = "CHAOS_ZYGOTE"
STACKS = b"stacks"
_MAX_REQUEST_BYTES = 1 << 17
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
_READY = b"ready\n"


class Zygote:
    """The process that workers are forked from; ends with the `with` block or with the process that made it.

    model: where it leaves a tiny base model, so that nobody else has to load the libraries.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="zygote-")
        self.address = str(Path(self._folder.name, "socket"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Zygote:
        """Returns once the libraries are loaded and the model is made."""
        paths = ":".join(str(folder) for folder in (ROOT, ROOT / "api", ROOT / "trainer-image"))
        environment = {**os.environ, "PYTHONPATH": paths, **_ENVIRONMENT}
        log: IO[bytes]
        with Path(self._folder.name, "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.address, str(self._model)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != _READY:
            raise RuntimeError("the zygote did not start:\n" + Path(self._folder.name, "log").read_text()[-4000:])
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()


def _preload() -> None:
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import finetune_trainer.worker.main
    import finetune_trainer.worker.train  # noqa: F401


def _make_model(target: str) -> None:
    """In a child of its own: making a model starts threads, which a process that forks must not have."""
    maker = os.fork()
    if maker == 0:
        from tests.train.models import tiny_model

        os.dup2(2, 1)  # the libraries' words are not for the one that waits for ours
        shutil.copytree(tiny_model("llama", spread=0.2), target)
        os._exit(0)
    _, status = os.waitpid(maker, 0)
    assert status == 0, "the model was not made"


def _serve(address: str, model: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        _preload()
        _make_model(model)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes the keepers in
        os.write(1, _READY)
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                return
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _keep(connection)


def _keep(connection: socket.socket) -> None:
    """The keeper: one worker, its end told to the relay; without a relay no worker. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 2)
    if not request:
        os._exit(0)
    worker = os.fork()
    if worker == 0:
        connection.close()
        _work(json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(worker)
    while True:
        readable, _, _ = select.select([ended, connection], [], [])
        if ended in readable:
            break
        if connection.recv(64) == STACKS:
            os.kill(worker, signal.SIGUSR1)
        else:  # the relay is gone
            os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def _work(request: dict[str, Any], streams: list[int]) -> None:
    """The worker: what the relay was asked to be. Does not return."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in zip((nothing, *streams), (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    import torch

    from finetune_trainer.worker.main import main
    from tests.chaos.journal import install

    torch.set_num_threads(1)
    code = 1
    try:
        install(os.environ)
        code = main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
