"""A TCP proxy on loopback that passes bytes as slowly as it is told to, for a storage that is slow or silent."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType

_CHUNK_BYTES = 4096
_LOOK_SECONDS = 0.02


class Proxy:
    """Passes connections on to a port of this machine; ends with the `with` block.

    rate: bytes per second over all connections and both directions. None: all that comes. 0: nothing passes, but
    connections stay open, as behind a network that drops packets. May be set at any time.
    """

    def __init__(self, target_port: int) -> None:
        self.rate: float | None = None
        self.port = 0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._free_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        """Returns once connections are taken."""
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Cancelled at the end: asyncio would print each connection's traceback.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            with contextlib.closing(back):
                await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(_CHUNK_BYTES):
            await self._pass(len(chunk))
            sink.write(chunk)
            await sink.drain()
        with contextlib.suppress(OSError):
            sink.write_eof()

    async def _pass(self, size: int) -> None:
        """Returns once size bytes may go on."""
        while self.rate == 0:  # noqa: ASYNC110  # it is set from another thread
            await asyncio.sleep(_LOOK_SECONDS)
        if self.rate is not None:
            now = self._loop.time()
            self._free_at = max(self._free_at, now) + size / self.rate
            await asyncio.sleep(self._free_at - now)
