"""Bounds: a request's headers and its body are refused as soon as they exceed what is allowed, or come too slowly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_triton.gateway.apis.wire.errors import ApiError, error_response
from deepseek_triton.gateway.settings import GatewaySettings

UPLOAD_PATH, UPLOAD_TYPE = "/v1/files", b"multipart/form-data"  # its route writes it to the disk as it comes
FORM_BYTES = 16 << 10  # of an upload's form, beside the file


class Bounds:
    """Middleware: `receive` raises `ApiError` where a bound is exceeded; here it becomes the answer.

    A body is never read further than its bound, and not at all where its Content-Length says that it is too long.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on within its bounds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_started = False

        async def send_noted(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            self._check_headers(scope["headers"], self._bounds(scope).max_bytes)
            await self._app(scope, _BoundedBody(receive, self._bounds(scope)), send_noted)
        except ApiError as error:
            if is_started:
                raise
            await error_response(error, scope["path"])(scope, receive, send)

    def _check_headers(self, headers: list[tuple[bytes, bytes]], max_bytes: int) -> None:
        limits = self._settings
        num_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) > limits.max_headers or num_bytes > limits.max_header_bytes:
            raise ApiError(
                431, f"a request may have {limits.max_headers} headers of {limits.max_header_bytes} bytes together"
            )
        for name, value in headers:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise ApiError(415, "a body must not be compressed")
            if name == b"content-length" and not value.isdigit():
                raise ApiError(400, "Content-Length must be a number")
            if name == b"content-length" and (len(value) > 18 or int(value) > max_bytes):
                raise _too_long(max_bytes)

    def _bounds(self, scope: Scope) -> _BodyBounds:
        limits = self._settings
        is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        if is_upload and dict(scope["headers"]).get(b"content-type", b"").lower().startswith(UPLOAD_TYPE):
            return _BodyBounds(limits.max_file_bytes + FORM_BYTES, limits.request_timeout_s, limits.body_timeout_s)
        return _BodyBounds(limits.max_body_bytes, limits.body_timeout_s, limits.body_timeout_s)


@dataclass(frozen=True)
class _BodyBounds:
    """max_bytes, timeout_s: of the whole body. pause_s: the longest time between two parts of it."""

    max_bytes: int
    timeout_s: float
    pause_s: float


class _BoundedBody:
    """A `receive` that counts bytes and seconds until the body has come."""

    def __init__(self, receive: Receive, bounds: _BodyBounds) -> None:
        self._receive = receive
        self._bounds = bounds
        self._num_bytes = 0
        self._ends_at = asyncio.get_running_loop().time() + bounds.timeout_s
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        left_s = min(self._ends_at - asyncio.get_running_loop().time(), self._bounds.pause_s)
        try:
            message = await asyncio.wait_for(self._receive(), max(left_s, 0.0))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body must come within {self._bounds.timeout_s:g} s") from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._bounds.max_bytes:
                raise _too_long(self._bounds.max_bytes)
            self._is_whole = not message.get("more_body", False)
        return message


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(413, f"a body may have {max_bytes} bytes at most")
