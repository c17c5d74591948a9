"""Reads the progress document of a pod. What answers is the tenant's code: nothing that it says is trusted."""

from __future__ import annotations

import ipaddress

import aiohttp
from pydantic import ValidationError

from finetune_api.documents import PROGRESS_BYTES, ProgressDocument, TerminationMessage

SECONDS = 2.0
_FIELDS = {field.alias or name for name, field in ProgressDocument.model_fields.items()}


class NoProgress(Exception):
    """The pod gave no usable document; the message says why and never quotes the pod."""


def open_session() -> aiohttp.ClientSession:
    """A session without cookies, proxies, decompression and kept connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=64, force_close=True),
        timeout=aiohttp.ClientTimeout(total=SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


async def read(session: aiohttp.ClientSession, address: str, port: int, attempt: int) -> ProgressDocument:
    """GET http://address:port/progress within two seconds and 64 KiB, without following redirects.

    Raises NoProgress where the pod does not answer, or answers with anything but the document of that attempt.
    """
    try:
        host = ipaddress.ip_address(address)
        where = f"[{host}]" if host.version == 6 else str(host)
        async with session.get(f"http://{where}:{port}/progress", allow_redirects=False) as response:
            if response.status != 200:
                raise NoProgress(f"HTTP status {response.status}")
            body = await _body(response)
    except TimeoutError as error:
        raise NoProgress(f"no answer within {SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise NoProgress(type(error).__name__) from error
    return parse(body, attempt)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > PROGRESS_BYTES:
            raise NoProgress(f"more than {PROGRESS_BYTES} bytes")
    return body


def parse(body: bytes, attempt: int) -> ProgressDocument:
    """The document; raises NoProgress where it breaks the schema or speaks for another attempt."""
    try:
        document = ProgressDocument.model_validate_json(body, strict=True)
    except ValidationError as error:
        wrong = sorted({str(fault["loc"][0]) for fault in error.errors() if fault["loc"]} & _FIELDS)
        raise NoProgress(f"not a progress document; wrong or missing: {', '.join(wrong) or 'the whole'}") from None
    if document.attempt != attempt:
        raise NoProgress(f"speaks for attempt {document.attempt}, not {attempt}")
    return document


def parse_termination(text: str) -> TerminationMessage | None:
    """The agent's termination message, or None where the container left something else."""
    try:
        return TerminationMessage.model_validate_json(text, strict=True)
    except ValidationError:
        return None
