"""What HTTP clients send and receive: Triton's generate extension, and `infer` for whole tensors.

The server sends no header before the first response, and the status is that of the first response: an error
may come as JSON, as an event under a status of 400 and more, or as an event after answers under status 200.
Synchronous and asyncio clients share this; it opens no connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from deepseek_triton.clients.errors import (
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
    rejection,
)
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.request import Scalar
from deepseek_triton.clients.score import Tensor
from deepseek_triton.clients.sse import EventReader
from deepseek_triton.ensemble.protocol.contract import TensorSpec

# A request holds a connection until its answer is complete, so their number has no limit.
LIMITS = httpx.Limits(max_connections=None)


def check_url(url: str) -> str:
    """The address without a slash at its end. Refuses what is none for HTTP."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https:// for HTTP, got {url!r}")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url must be an address, got {url!r}: {error}") from None
    return url.rstrip("/")


def generate_request(call: StreamCall) -> dict[str, Any]:
    """The arguments of httpx's `stream` for a request to a decoupled model."""
    body = {"id": call.request_id, **call.parameters} | {spec.name: value for spec, value in call.inputs.items()}
    path = _model_path(call.model, "generate_stream" if call.is_streamed else "generate")
    return {"method": "POST", "url": path, **_json(body, call.headers), "timeout": call.timeout_s}


def infer_request(call: TensorCall) -> dict[str, Any]:
    """The arguments of httpx's `request` for whole tensors."""
    inputs = [_input(spec, tensor) for spec, tensor in call.inputs.items()]
    body = {"id": call.request_id, "inputs": inputs, "parameters": dict(call.parameters)}
    return {"method": "POST", "url": _model_path(call.model, "infer"), **_json(body), "timeout": call.timeout_s}


def ready_request(model: str, timeout_s: float) -> dict[str, Any]:
    """The arguments of httpx's `request` for a readiness probe."""
    return {"method": "GET", "url": _model_path(model, "ready"), "timeout": timeout_s}


@contextmanager
def client_errors(url: str, timeout_s: float) -> Iterator[None]:
    """Turn httpx's exceptions into `ClientError`s."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise _timeout(url, timeout_s) from error
    except httpx.TransportError as error:
        raise ServerUnavailable(f"no server at {url}, or the connection broke: {error}") from error
    except (httpx.DecodingError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the response can't be decoded: {error}") from error


class BodyReader:
    """Reads the body of the HTTP response to a `generate_request`, piece by piece."""

    def __init__(self, call: StreamCall, url: str, deadline: float, response: httpx.Response) -> None:
        """`deadline`: on the monotonic clock, in seconds."""
        self._call = call
        self._url = url
        self._deadline = deadline
        self._status = response.status_code
        is_events = response.headers.get("Content-Type", "").startswith("text/event-stream")
        self._events = EventReader() if is_events else None
        self._whole = b""

    def push(self, piece: bytes) -> Iterator[Response]:
        """Give the responses that `piece` completes. Raises `ClientError`."""
        if time.monotonic() > self._deadline:
            raise _timeout(self._url, self._call.timeout_s)
        if self._events is None:
            self._whole += piece
        else:
            yield from map(self._read, self._events.push(piece))

    def end(self) -> Iterator[Response]:
        """Give the responses that the body's end completes. Raises `ClientError`."""
        if self._events is None:
            yield self._read(self._whole.decode())

    def _read(self, text: str) -> Response:
        fields = _parse(text, self._status)
        return {spec.name: _values(fields[spec.name]) for spec in self._call.outputs if spec.name in fields}


def read_infer(response: httpx.Response, outputs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """The `outputs` that the response to an `infer_request` has. Raises `ClientError`."""
    fields = _parse(response.text, response.status_code)
    names = {spec.name for spec in outputs}
    try:
        return {
            tensor["name"]: Tensor(tuple(tensor["shape"]), tensor["data"])
            for tensor in fields["outputs"]
            if tensor["name"] in names
        }
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"the response isn't one of infer: {error!r}") from error


def _model_path(model: str, method: str) -> str:
    return f"/v2/models/{quote(model, safe='')}/{method}"


def _json(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"content": json.dumps(body), "headers": {"Content-Type": "application/json", **(headers or {})}}


def _input(spec: TensorSpec, tensor: Tensor) -> dict[str, Any]:
    datatype = "BYTES" if spec.dtype == "STRING" else spec.dtype
    return {"name": spec.name, "datatype": datatype, "shape": tensor.shape, "data": tensor.values}


def _timeout(url: str, timeout_s: float) -> RequestTimeout:
    return RequestTimeout(f"no complete answer from {url} within {timeout_s:g} s")


def _values(field: Any) -> list[Scalar]:
    """A tensor's elements: Triton writes one element as such, any other number of them as a list."""
    return field if isinstance(field, list) else [field]


def _parse(text: str, status: int) -> dict[str, Any]:
    """Read one response; an error may come under any status."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        fields = None
    if isinstance(fields, dict) and "error" in fields:
        raise rejection(str(fields["error"]))
    if status >= httpx.codes.BAD_REQUEST:
        # Not Triton's own: a proxy's page, say.
        raise RequestRejected(f"HTTP status {status}: {text[:200]}")
    if not isinstance(fields, dict):
        raise ProtocolError(f"the response must be a JSON object, got {text[:200]!r}")
    return fields
