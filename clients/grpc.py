"""GrpcClient: one `ModelStreamInfer` call for each request.

Decoupled models answer over gRPC only by the stream call. The generated stub is used rather than
`tritonclient.grpc.InferenceServerClient`, which holds one stream a client: a call each gives every request
its own deadline and cancellation, and lets any number of threads share one client.
"""

from __future__ import annotations

from collections.abc import Generator

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients import grpc_wire
from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.score import Tensor


class GrpcClient(BaseClient):
    """Calls a served model over gRPC, in plain text. Thread-safe: threads may share one client.

    `url` is `host:port`. `timeout_s` (seconds) is each request's deadline, exact to some milliseconds.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, model, timeout_s)
        grpc_wire.check_url(url)
        self._channel = grpc.insecure_channel(url, options=grpc_wire.CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def _exchange(self, call: StreamCall) -> Generator[Response, None, None]:
        # The request iterator ends after one message, so the server ends the call after the last response.
        rpc = self._stub.ModelStreamInfer(iter([grpc_wire.stream_message(call)]), timeout=call.timeout_s)
        try:
            for response in rpc:
                yield grpc_wire.read_stream_response(response, call.outputs)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, call.timeout_s) from error
        finally:
            rpc.cancel()  # nothing to a call that has ended

    def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        try:
            response = self._stub.ModelInfer(grpc_wire.tensor_message(call), timeout=call.timeout_s)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, call.timeout_s) from error
        return grpc_wire.read_response(response, call.outputs)

    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        try:
            return bool(self._stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=timeout_s).ready)
        except grpc.RpcError as error:
            raise grpc_wire.client_error(error, self.url, timeout_s) from error

    def _close_transport(self) -> None:
        self._channel.close()
