"""The progress document is hostile input: a real HTTP server on loopback tries what a tenant could."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from finetune_api.documents import PROGRESS_BYTES, ProgressDocument, Stage
from finetune_operator.progress import document

GOOD = ProgressDocument(attempt=3, stage=Stage.TRAINING, step=420, total_steps=1000, loss=1.25)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def pod(handler: Handler, path: str = "/progress") -> AsyncIterator[int]:
    """A server on loopback; its port."""
    app = web.Application()
    app.router.add_get(path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(handler: Handler) -> ProgressDocument:
    async with pod(handler) as port, document.open_session() as session:
        return await document.read(session, "127.0.0.1", port, attempt=3)


def saying(text: str | bytes, status: int = 200, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        body = text.encode() if isinstance(text, str) else text
        return web.Response(body=body, status=status, headers=headers)

    return handler


def changed(**fields: object) -> str:
    return json.dumps({**GOOD.to_json(), **fields})


async def test_a_good_document_is_read() -> None:
    assert await ask(saying(GOOD.model_dump_json(by_alias=True, exclude_none=True))) == GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the whole"),
        ("[]", "the whole"),
        ("not json", "the whole"),
        ("[" * 60_000, "the whole"),
        (changed(surprise="<script>"), "the whole"),
        (changed(step="420"), "step"),
        (changed(step=-1), "step"),
        (changed(step=2**40), "step"),
        (changed(loss="NaN"), "loss"),
        (changed(stage="Owned"), "stage"),
        (changed(version=2), "version"),
        (changed(loss=1e999).replace("Infinity", "NaN"), "loss"),
        (changed(attempt=4), "speaks for attempt 4, not 3"),
    ],
)
async def test_a_document_that_breaks_the_schema_is_refused(text: str, reason: str) -> None:
    with pytest.raises(document.NoProgress, match=reason) as refusal:
        await ask(saying(text))
    assert "surprise" not in str(refusal.value)


async def test_a_large_answer_is_cut_off() -> None:
    with pytest.raises(document.NoProgress, match="more than 65536 bytes"):
        await ask(saying(changed() + " " * PROGRESS_BYTES))


async def test_an_endless_answer_is_cut_off() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 1024)

    with pytest.raises(document.NoProgress, match="more than"):
        await ask(handler)


async def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with pytest.raises(document.NoProgress):
        await ask(saying(bomb, **{"Content-Encoding": "gzip"}))


async def test_a_redirect_is_not_followed() -> None:
    visits = []

    async def elsewhere(request: web.Request) -> web.Response:
        visits.append(request.path)
        return web.Response(text=changed())

    async with pod(elsewhere, "/metadata") as port:
        with pytest.raises(document.NoProgress, match="HTTP status 302"):
            await ask(saying("", 302, Location=f"http://127.0.0.1:{port}/metadata"))
    assert visits == []


async def test_a_slow_answer_is_given_up_after_two_seconds() -> None:
    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response(text=changed())

    with pytest.raises(document.NoProgress, match="no answer within 2 s"):
        await ask(handler)


@pytest.mark.parametrize("address", ["", "metadata.google.internal", "127.0.0.1:80@127.0.0.1", "127.0.0.1/x"])
async def test_only_an_ip_address_is_asked(address: str) -> None:
    async with document.open_session() as session:
        with pytest.raises(document.NoProgress):
            await document.read(session, address, 1, attempt=3)


def test_a_container_that_leaves_something_else_has_no_termination_message() -> None:
    assert document.parse_termination("Killed") is None
    assert document.parse_termination('{"outcome": "Succeeded", "step": "7"}') is None
    found = document.parse_termination('{"outcome": "Succeeded", "step": 7}')
    assert found is not None and found.step == 7
