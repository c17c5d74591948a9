"""Trainers without training: each answers on its pod's own loopback address as the agent does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from aiohttp import web

from finetune_api.documents import ProgressDocument
from finetune_api.naming import PROGRESS_PORT

T = TypeVar("T")


class FakeTrainers:
    """HTTP servers for many pods in one thread; each serves the document that the test gave it."""

    def __init__(self) -> None:
        self.delay_seconds = 0.0
        """How long each answer takes."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-trainers", daemon=True)
        self._documents: dict[str, ProgressDocument | Callable[[], ProgressDocument]] = {}
        self._asked: dict[str, int] = {}
        self._sites: dict[str, web.TCPSite] = {}
        app = web.Application()
        app.router.add_get("/progress", self._progress)
        app.router.add_get("/healthz", self._healthz)
        self._runner = web.AppRunner(app)

    def __enter__(self) -> FakeTrainers:
        self._thread.start()
        self._do(self._runner.setup())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def says(self, address: str, document: ProgressDocument | Callable[[], ProgressDocument]) -> None:
        """From now on the pod of that address answers with this document, or with what it returns when asked."""
        self._documents[address] = document
        if address not in self._sites:
            self._sites[address] = site = web.TCPSite(self._runner, address, PROGRESS_PORT)
            self._do(site.start())

    def stops(self, address: str) -> None:
        """Nothing listens at that address any more."""
        site = self._sites.pop(address, None)
        if site:
            self._do(site.stop())

    def asked(self, address: str) -> int:
        """How often the pod was asked for its progress."""
        return self._asked.get(address, 0)

    async def _progress(self, request: web.Request) -> web.Response:
        address = self._address(request)
        self._asked[address] = self._asked.get(address, 0) + 1
        await asyncio.sleep(self.delay_seconds)
        document = self._documents[address]
        return web.json_response((document() if callable(document) else document).to_json())

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    def _address(self, request: web.Request) -> str:
        assert request.transport is not None
        address: str = request.transport.get_extra_info("sockname")[0]
        return address

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)
