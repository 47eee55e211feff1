"""A gRPC server that has a model, answers looks, and fails each request: what opens a breaker and keeps it open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


class _Failing(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        response = service_pb2.ModelMetadataResponse(name=request.name)
        response.outputs.add(name="finish_reason", datatype="BYTES", shape=[-1, 1])
        return response

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        next(requests)
        yield service_pb2.ModelStreamInferResponse(error_message="[internal] the engine fails on purpose")


@contextlib.contextmanager
def failing_server() -> Iterator[str]:
    """Its address, host:port."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Failing(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()
