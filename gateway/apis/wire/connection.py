"""Answers that end when the client leaves: what computes them is cancelled, and so the slot on the server is freed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError, as_api_error
from deepseek_triton.gateway.record import record_of

Result = TypeVar("Result")

CLIENT_LEFT = 499  # nginx's status for it


class EventSource(Protocol):
    """What an `EventStream` sends."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events, whole ones. An error before the first one is told by the response's status."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream in which `error` has come: usage so far, and the error in the API's form."""
        ...


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Wait for `work`; None if the client leaves first, in which case `work` has been cancelled.

    Raises `ended_by` of the request's record, if the gateway ends the request.
    """
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            _note_the_end(request.scope)
            return None
        return await task
    finally:
        await _end(task, leaving)


def left() -> Response:
    """The response to a client that has left; nobody reads it, but logs show its status."""
    return Response(status_code=CLIENT_LEFT)


class EventStream(Response):
    """A response of server-sent events. In silence of `heartbeat_s` seconds it sends a comment line."""

    media_type = "text/event-stream"

    def __init__(self, source: EventSource, heartbeat_s: float) -> None:
        super().__init__(headers=sse.HEADERS)
        del self.headers["content-length"]
        self._source = source
        self._heartbeat_s = heartbeat_s
        self._is_started = False
        self._sent_at = 0.0
        self._turn = asyncio.Lock()  # events and heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; return when they end or the client has left."""
        self._sent_at = time.monotonic()
        task = asyncio.create_task(self._send_events(send, scope))
        leaving = asyncio.create_task(_disconnect(receive))
        beating = asyncio.create_task(self._send_heartbeats(send))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                return
            await _end(task, beating)
            try:
                _note_the_end(scope)
                if not self._is_started:
                    await left()(scope, receive, send)
            except Exception as error:
                if not self._is_started:
                    raise
                await self._send(send, self._source.failure(as_api_error(error)))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _end(task, leaving, beating)

    async def _send_events(self, send: Send, scope: Scope) -> None:
        try:
            async with contextlib.aclosing(self._source.events()) as events:
                async for event in events:
                    await self._send(send, event)
        except Exception as error:
            if not self._is_started:
                raise
            await self._send(send, self._source.failure(as_api_error(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._turn:
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._sent_at = time.monotonic()

    async def _send_heartbeats(self, send: Send) -> None:
        while True:
            wait_s = self._sent_at + self._heartbeat_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._send(send, sse.HEARTBEAT)


def _note_the_end(scope: Scope) -> None:
    """The client has left, or the gateway ends the request: raises the reason then."""
    record = record_of(scope)
    if record.ended_by is not None:
        raise record.ended_by
    record.has_left = True


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait for it: a request is stopped on the server before its route returns."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
