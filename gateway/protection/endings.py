"""Endings: requests end in bounded time: at the time limit, and after SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_triton.gateway.apis.wire.errors import ApiError, error_response
from deepseek_triton.gateway.record import RequestRecord, record_of
from deepseek_triton.gateway.settings import GatewaySettings

# What is answered while the gateway drains, too. Readiness isn't: so balancers send nothing more.
ANSWERED_PATHS = frozenset(("/health/live", "/metrics"))
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# So is a response that was computed in the background: it would be lost with this process.
READ_PATHS = "/v1/responses/"
READ_S = 5.0  # seconds in which its client, who asks for it now and then, finds it complete
# Seconds in which a request that is ended tells its client so; the server that runs the app cancels it then.
FAREWELL_S = 2.0


class Endings:
    """Middleware, the outermost: notes what runs, and ends it.

    After a signal new requests get 503. Running ones, and answers that are computed in the background, have `drain_s`,
    and then end with an error in their API's form. When none is left, the signal's handler before, uvicorn's, stops the
    server. A second SIGINT doesn't wait.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._running: dict[int, _Request] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._state: Any = None  # the app's
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request to its end, its own or the one that is made for it."""
        if scope["type"] == "lifespan":
            self._state = scope["app"].state
            async with self._signals():
                await self._app(scope, receive, send)
        elif self._is_draining and not _is_answered(scope):
            refusal = ApiError(
                503,
                "the gateway is shutting down; retry elsewhere or later",
                code="draining",
                headers={"Retry-After": "1", "Connection": "close"},
            )
            await error_response(refusal, scope["path"])(scope, receive, send)
        else:
            await self._run(scope, receive, send)

    async def drain(self) -> None:
        """Refuse new requests, and give the jobs of the queue back; return when the running ones have ended."""
        self._is_draining = True
        jobs = getattr(self._state, "jobs", None)
        if jobs is not None:
            jobs.drain()
        for limit_s in (self._settings.drain_s, FAREWELL_S):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), limit_s)
                return
            for request in self._running.values():
                request.end(ApiError(503, "the gateway is shutting down", code="draining"))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(record_of(scope), receive)
        limit_s = self._settings.request_timeout_s
        late = ApiError(504, f"the answer took longer than {limit_s:g} s", code="timeout")
        # The backend has its own limit, which starts when the body has come: this one is for what it doesn't see.
        timer = asyncio.get_running_loop().call_later(limit_s + self._settings.body_timeout_s, request.end, late)
        self._running[id(request)] = request
        self._is_idle.clear()
        try:
            await self._app(scope, request.receive, send)
        finally:
            timer.cancel()
            task = record_of(scope).task
            if task is None:
                self._end(request)
            else:
                task.add_done_callback(lambda _: self._end_background(request))

    def _end(self, request: _Request) -> None:
        del self._running[id(request)]
        if not self._running:
            self._is_idle.set()

    def _end_background(self, request: _Request) -> None:
        """An answer is complete that its client has to fetch yet."""
        if self._is_draining:
            asyncio.get_running_loop().call_later(READ_S, self._end, request)
        else:
            self._end(request)

    @contextlib.asynccontextmanager
    async def _signals(self) -> AsyncIterator[None]:
        """Take the signals over; only the main thread gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

        def handle(number: int, frame: Any) -> None:
            if not self._is_draining:
                self._is_draining = True
                loop.call_soon_threadsafe(self._begin_drain, lambda: _call(before[number], number))
            elif number == signal.SIGINT:
                _call(before[number], number)

        for number in SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for own, handler in before.items():
                signal.signal(own, handler)

    def _begin_drain(self, then: Callable[[], None]) -> None:
        async def drain() -> None:
            await self.drain()
            then()

        task = asyncio.ensure_future(drain())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Request:
    """A request that can be ended: its app is told that the client has left, and finds the reason in its record."""

    def __init__(self, record: RequestRecord, receive: Receive) -> None:
        self._record = record
        self._receive = receive
        self._is_ended = asyncio.Event()

    def end(self, reason: ApiError) -> None:
        """End it; the first reason counts."""
        self._record.ended_by = self._record.ended_by or reason
        self._is_ended.set()

    async def receive(self) -> Message:
        """The client's next message, or the end."""
        receiving = asyncio.ensure_future(self._receive())
        ending = asyncio.ensure_future(self._is_ended.wait())
        try:
            await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() and not ending.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            ending.cancel()


def _is_answered(scope: Scope) -> bool:
    """Whether a request is answered while the gateway drains."""
    path: str = scope["path"]
    return path in ANSWERED_PATHS or (scope["method"] == "GET" and path.startswith(READ_PATHS))


def _call(handler: Any, number: int) -> None:
    """Call a signal's handler as Python does."""
    if callable(handler):
        handler(number, None)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
