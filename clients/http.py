"""HttpClient: Triton's generate extension, `generate` for one response and `generate_stream` for many."""

from __future__ import annotations

import time
from collections.abc import Generator

import httpx

from deepseek_triton.clients import http_wire
from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.score import Tensor


class HttpClient(BaseClient):
    """Calls a served model over HTTP. Thread-safe: threads may share one client and its connections.

    `url` starts with http:// or https://. `timeout_s` (seconds) bounds a whole request: it is checked
    whenever something arrives, and no wait for something to arrive is longer. A server that falls silent
    midway is therefore noticed `timeout_s` after its last byte.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(http_wire.check_url(url), model, timeout_s)
        # A transport of our own takes no proxy from the environment: an inference server is reached directly.
        self._client = httpx.Client(base_url=self.url, transport=httpx.HTTPTransport(limits=http_wire.LIMITS))

    def _exchange(self, call: StreamCall) -> Generator[Response, None, None]:
        deadline = time.monotonic() + call.timeout_s
        with (
            http_wire.client_errors(self.url, call.timeout_s),
            self._client.stream(**http_wire.generate_request(call)) as response,
        ):
            body = http_wire.BodyReader(call, self.url, deadline, response)
            for piece in response.iter_bytes():
                yield from body.push(piece)
            yield from body.end()

    def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        with http_wire.client_errors(self.url, call.timeout_s):
            response = self._client.request(**http_wire.infer_request(call))
        return http_wire.read_infer(response, call.outputs)

    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        with http_wire.client_errors(self.url, timeout_s):
            return self._client.request(**http_wire.ready_request(model, timeout_s)).status_code == httpx.codes.OK

    def _close_transport(self) -> None:
        self._client.close()
