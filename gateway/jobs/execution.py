"""Execution: one request to an endpoint of the gateway, within this process and without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from deepseek_triton.gateway.record import KEY, RequestRecord, TokenUsage

OnChunk = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    status: HTTP's. body: JSON; of a stream, the list of its events. usage: the tokens that were used. is_unsent: no
    server was asked, because none may be now. retry_after_s: what the header Retry-After says; 0: nothing.
    """

    status: int
    body: str
    usage: TokenUsage
    is_unsent: bool = False
    retry_after_s: float = 0.0

    @property
    def code(self) -> str:
        """The machine-readable word of an error; "": none."""
        error = json.loads(self.body).get("error") if self.status >= 400 else None
        return str((error or {}).get("code") or (error or {}).get("type") or "")


async def answer(
    app: ASGIApp,
    path: str,
    body: str,
    *,
    request_id: str,
    owner: str,
    caller: str = "",
    on_chunk: OnChunk | None = None,
) -> Answer:
    """Ask `app`. `on_chunk` gets the data of each event of a stream. Cancelled, it ends the request on the server."""
    record = RequestRecord(request_id, owner=owner, caller=caller)
    reader = _Reader(on_chunk)
    waiting: list[Message] = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()  # the client of this request never leaves
        raise AssertionError

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"queue"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
        KEY: record,
    }
    try:
        await app(scope, receive, reader.send)
    except Exception:  # it has been answered with 500 and logged
        if not reader.status:
            raise
    return Answer(reader.status, reader.body(), record.usage, record.is_unsent, reader.retry_after_s)


class _Reader:
    """Takes a response."""

    def __init__(self, on_chunk: OnChunk | None) -> None:
        self.status = 0
        self.retry_after_s = 0.0
        self._on_chunk = on_chunk
        self._is_stream = False
        self._parts: list[bytes] = []
        self._rest = b""
        self._chunks: list[str] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message["headers"])
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self.retry_after_s = float(headers.get(b"retry-after", 0))
        elif self._is_stream:
            *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
            for event in events:
                await self._take(event)
        else:
            self._parts.append(message.get("body", b""))

    def body(self) -> str:
        if self._is_stream:
            return "[" + ",".join(self._chunks) + "]"
        return b"".join(self._parts).decode() or "null"

    async def _take(self, event: bytes) -> None:
        for line in event.decode().split("\n"):
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                self._chunks.append(data)
                if self._on_chunk is not None:
                    await self._on_chunk(data)
