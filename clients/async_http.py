"""AsyncHttpClient: Triton's generate extension, `generate` for one response and `generate_stream` for many."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import httpx

from deepseek_triton.clients import http_wire
from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.async_base import AsyncBaseClient
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.score import Tensor


class AsyncHttpClient(AsyncBaseClient):
    """Calls a served model over HTTP. Tasks of one event loop may share one client and its connections.

    `url` starts with http:// or https://. `timeout_s` (seconds) bounds a request as it does for `HttpClient`.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(http_wire.check_url(url), model, timeout_s)
        # A transport of our own takes no proxy from the environment: an inference server is reached directly.
        transport = httpx.AsyncHTTPTransport(limits=http_wire.LIMITS)
        self._client = httpx.AsyncClient(base_url=self.url, transport=transport)

    async def _exchange(self, call: StreamCall) -> AsyncGenerator[Response, None]:
        deadline = time.monotonic() + call.timeout_s
        with http_wire.client_errors(self.url, call.timeout_s):
            async with self._client.stream(**http_wire.generate_request(call)) as response:
                body = http_wire.BodyReader(call, self.url, deadline, response)
                async for piece in response.aiter_bytes():
                    for outputs in body.push(piece):
                        yield outputs
                for outputs in body.end():
                    yield outputs

    async def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        with http_wire.client_errors(self.url, call.timeout_s):
            response = await self._client.request(**http_wire.infer_request(call))
        return http_wire.read_infer(response, call.outputs)

    async def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        with http_wire.client_errors(self.url, timeout_s):
            response = await self._client.request(**http_wire.ready_request(model, timeout_s))
        return response.status_code == httpx.codes.OK

    async def _close_transport(self) -> None:
        await self._client.aclose()
