"""BoundedConnection: uvicorn's HTTP connection, with bounds on what an app never sees.

Headers that are endless or come byte by byte, bodies in countless chunks, clients that don't read, bodies that go on
after their refusal, and too many connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

MAX_PIPELINED = 16  # requests that wait for the answer to one before
# What the kernel and the process keep for a client that doesn't read, each, in bytes.
SEND_BUFFER = 64 << 10


@dataclass(frozen=True)
class Connections:
    """Makes connections; uvicorn takes it in place of a protocol's class, and hands it to its worker processes."""

    settings: GatewaySettings

    def __call__(self, **arguments: Any) -> BoundedConnection:
        """One connection."""
        return BoundedConnection(self.settings, **arguments)


class BoundedConnection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, settings: GatewaySettings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings = settings
        # The request that the app answers; `cycle` is the last that has come, which may wait behind it.
        self._answered: RequestResponseCycle | None = None
        self._fault: ApiError | None = None  # why the parser was stopped
        self._late: asyncio.TimerHandle | None = None  # runs while no request is being answered and data have come
        self._unread: asyncio.TimerHandle | None = None  # runs while the client doesn't read
        self._num_headers = self._header_bytes = 0
        self._num_chunks = self._num_discarded = 0
        self._is_in_headers = True
        self._has_begun = False  # a request, in the data that are being parsed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it: there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            transport.abort()
            return
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            timeout_ms = int(self._settings.send_timeout_s * 1000)
            # The kernel ends it when the client takes nothing so long, though the process has nothing more to write.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        transport.set_write_buffer_limits(high=SEND_BUFFER)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and tell the app; what waits behind its request is dropped."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        self._headers_have_come()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        self._unset_keepalive_if_required()
        was_in_headers, self._has_begun = self._is_in_headers, False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # no other protocol is spoken here: the request is answered as any
        except httptools.HttpParserError:
            self._refuse(self._fault or ApiError(400, "this is no valid HTTP request"))
            return
        if was_in_headers and self._is_in_headers and not self._has_begun:
            self._header_bytes += len(data)  # a header's part, which `on_header` hasn't seen
            if self._header_bytes > 2 * self._settings.max_header_bytes:
                self._refuse(self._headers_fault())
                return
        if self._is_answering():
            return
        self._expect_headers()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """The app begins to answer a request."""
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._has_begun = self._is_in_headers = True
        self._num_headers = self._header_bytes = self._num_chunks = self._num_discarded = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request's line."""
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._num_headers += 1
        self._count_header(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        """All headers have come: the app starts."""
        self._is_in_headers = False
        self._headers_have_come()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fault = ApiError(400, f"at most {MAX_PIPELINED} requests may wait on one connection")
            raise self._fault
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """A chunk of the body begins."""
        self._num_chunks += 1
        if self._num_chunks > self._settings.max_chunks:
            self._fault = ApiError(413, f"a body may come in {self._settings.max_chunks} chunks at most")
            raise self._fault

    def on_body(self, body: bytes) -> None:
        """A part of the body: for the app, or, after its answer, for nobody."""
        super().on_body(body)
        if self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > self._settings.max_body_bytes:
                self.transport.close()

    def on_message_complete(self) -> None:
        """The whole request has come."""
        super().on_message_complete()
        self._is_in_headers = True

    def pause_writing(self) -> None:
        """The client reads slower than the answer comes."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        """A request's headers must come from now on, or the rest of a body whose answer has been given."""
        if self._late is None:
            self._late = self.loop.call_later(self._settings.header_timeout_s, self._give_up)

    def _headers_have_come(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if not self._is_answering():
            self._refuse(ApiError(408, f"the headers must come within {self._settings.header_timeout_s:g} s"))

    def _count_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        limits = self._settings
        if self._num_headers > limits.max_headers or self._header_bytes > limits.max_header_bytes:
            self._fault = self._headers_fault()
            raise self._fault

    def _headers_fault(self) -> ApiError:
        limits = self._settings
        return ApiError(
            431, f"a request may have {limits.max_headers} headers and {limits.max_header_bytes} bytes of them"
        )

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, and say why if nothing of an answer has been sent."""
        log.debug("a connection is closed: %s", error.message)
        answered = self._answered
        is_in_answer = answered is not None and answered.response_started and not answered.response_complete
        has_asked = self._header_bytes > 0 or error.status != 408
        if has_asked and not is_in_answer and not self.transport.is_closing():
            body = json.dumps(error.body("")).encode()
            self.transport.write(
                STATUS_LINE[error.status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()
