"""AsyncGrpcClient: one `ModelStreamInfer` call for each request, any number of them over one connection.

`grpc.py` says why the generated stub is used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients import grpc_wire
from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.async_base import AsyncBaseClient
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.score import Tensor


class AsyncGrpcClient(AsyncBaseClient):
    """Calls a served model over gRPC, in plain text. Tasks of one event loop may share one client.

    `url` is `host:port`. `timeout_s` (seconds) is each request's deadline, exact to some milliseconds.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, model, timeout_s)
        grpc_wire.check_url(url)
        self._channel: Any = None  # belongs to the event loop of the first request
        self._stub: Any = None

    async def _exchange(self, call: StreamCall) -> AsyncGenerator[Response, None]:
        # The request iterator ends after one message, so the server ends the call after the last response.
        messages = iter([grpc_wire.stream_message(call)])
        rpc = self._connected().ModelStreamInfer(messages, timeout=call.timeout_s, metadata=tuple(call.headers.items()))
        try:
            async for response in rpc:
                yield grpc_wire.read_stream_response(response, call.outputs)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, call.timeout_s) from error
        finally:
            rpc.cancel()  # nothing to a call that has ended

    async def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        try:
            response = await self._connected().ModelInfer(grpc_wire.tensor_message(call), timeout=call.timeout_s)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, call.timeout_s) from error
        return grpc_wire.read_response(response, call.outputs)

    async def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        message = service_pb2.ModelReadyRequest(name=model)
        try:
            return bool((await self._connected().ModelReady(message, timeout=timeout_s)).ready)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, timeout_s) from error

    async def _close_transport(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _connected(self) -> Any:
        if self._stub is None:
            self._channel = grpc.aio.insecure_channel(self.url, options=grpc_wire.CHANNEL_OPTIONS)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub
