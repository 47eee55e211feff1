"""The HTTP client: Triton's generate extension, `generate` for one response and `generate_stream` for many.

The server sends no header before the first response, and the status is that of the first response: an error
may come as JSON, as an event under a status of 400 and more, or as an event after answers under status 200.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
)
from deepseek_triton.clients.request import Scalar
from deepseek_triton.clients.score import Tensor
from deepseek_triton.clients.sse import iter_events
from deepseek_triton.ensemble.protocol.contract import TensorSpec


class HttpClient(BaseClient):
    """Calls a served model over HTTP. Thread-safe: threads may share one client and its connections.

    `url` starts with http:// or https://. `timeout_s` (seconds) bounds a whole request: it is checked
    whenever something arrives, and no wait for something to arrive is longer. A server that falls silent
    midway is therefore noticed `timeout_s` after its last byte.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url.rstrip("/"), model, timeout_s)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https:// for HTTP, got {url!r}")
        # A transport of our own: no proxy from the environment, for an inference server is reached directly;
        # and no limit to the connections, for a request holds one until its answer is complete.
        transport = httpx.HTTPTransport(limits=httpx.Limits(max_connections=None))
        try:
            self._client = httpx.Client(base_url=self.url, transport=transport)
        except httpx.InvalidURL as error:
            raise ValueError(f"url must be an address, got {url!r}: {error}") from None

    def _exchange(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[TensorSpec, Scalar | tuple[str, ...]],
        outputs: tuple[TensorSpec, ...],
        *,
        stream: bool,
        timeout_s: float,
    ) -> Generator[dict[str, list[Scalar]], None, None]:
        body = {"id": request_id} | {spec.name: value for spec, value in inputs.items()}
        path = f"/v2/models/{quote(model, safe='')}/{'generate_stream' if stream else 'generate'}"
        deadline = time.monotonic() + timeout_s
        try:
            with self._client.stream(
                "POST",
                path,
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
                timeout=timeout_s,
            ) as response:
                pieces = self._until(deadline, response.iter_bytes(), timeout_s)
                is_events = response.headers.get("Content-Type", "").startswith("text/event-stream")
                bodies = iter_events(pieces) if is_events else iter([b"".join(pieces).decode()])
                for text in bodies:
                    fields = _parse(text, response.status_code)
                    yield {spec.name: _values(fields[spec.name]) for spec in outputs if spec.name in fields}
        except httpx.TimeoutException as error:
            raise self._timeout(timeout_s) from error
        except httpx.TransportError as error:
            raise ServerUnavailable(f"no server at {self.url}, or the connection broke: {error}") from error
        except (httpx.DecodingError, UnicodeDecodeError) as error:
            raise ProtocolError(f"the response can't be decoded: {error}") from error

    def _infer(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[TensorSpec, Tensor],
        outputs: tuple[TensorSpec, ...],
        timeout_s: float,
    ) -> dict[str, Tensor]:
        body = {
            "id": request_id,
            "inputs": [
                {
                    "name": spec.name,
                    "datatype": "BYTES" if spec.dtype == "STRING" else spec.dtype,
                    "shape": tensor.shape,
                    "data": tensor.values,
                }
                for spec, tensor in inputs.items()
            ],
        }
        path = f"/v2/models/{quote(model, safe='')}/infer"
        try:
            response = self._client.post(path, content=json.dumps(body), timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise self._timeout(timeout_s) from error
        except httpx.TransportError as error:
            raise ServerUnavailable(f"no server at {self.url}, or the connection broke: {error}") from error
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

    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        try:
            response = self._client.get(f"/v2/models/{quote(model, safe='')}/ready", timeout=timeout_s)
        except httpx.TransportError as error:
            raise ServerUnavailable(f"no server at {self.url}: {error}") from error
        return response.status_code == httpx.codes.OK

    def _close_transport(self) -> None:
        self._client.close()

    def _until(self, deadline: float, pieces: Iterator[bytes], timeout_s: float) -> Iterator[bytes]:
        for piece in pieces:
            if time.monotonic() > deadline:
                raise self._timeout(timeout_s)
            yield piece

    def _timeout(self, timeout_s: float) -> ClientError:
        return RequestTimeout(f"no complete answer from {self.url} within {timeout_s:g} s")


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
        raise RequestRejected(str(fields["error"]))
    if status >= httpx.codes.BAD_REQUEST:
        # Not Triton's own: a proxy's page, say.
        raise RequestRejected(f"HTTP status {status}: {text[:200]}")
    if not isinstance(fields, dict):
        raise ProtocolError(f"the response must be a JSON object, got {text[:200]!r}")
    return fields
