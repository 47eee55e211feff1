"""OldClientPort: a gRPC port for clients whose tensors Triton would refuse before any model sees them.

Triton takes a tensor only in the type and rank that the model's configuration declares. langchain-nvidia-trt sends
UINT32, as NVIDIA's ensembles of 2023 declared; clients of vllm_backend send no batch dimension. This port gives such
tensors the ensemble's types and shapes and passes everything else on as bytes. It costs some 0.1 ms a response, so
other clients use the server's own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.server.installation import ServerError

INFER_METHODS = ("/inference.GRPCInferenceService/ModelStreamInfer", "/inference.GRPCInferenceService/ModelInfer")
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
OWN_CONNECTION = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
DTYPES: dict[str, np.dtype[Any]] = {
    "INT32": np.dtype("<i4"), "UINT32": np.dtype("<u4"), "INT64": np.dtype("<i8"), "UINT64": np.dtype("<u8"),
    "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
SPECS = {spec.name: spec for spec in contract.ENSEMBLE.inputs}
START_TIMEOUT_S = 30.0
GRACE_S = 1.0  # for the calls under way when the port closes


def adapted(message: bytes) -> bytes:
    """A ModelInferRequest with its tensors in the types and ranks of the ensemble's inputs.

    A tensor that can't be converted without loss stays as it is: Triton then says what it expects.
    """
    request = service_pb2.ModelInferRequest.FromString(message)
    raw = request.raw_input_contents
    for index, tensor in enumerate(request.inputs):
        spec = SPECS.get(tensor.name)
        if spec is None:
            continue
        if len(tensor.shape) == len(spec.dims):
            tensor.shape.insert(0, 1)
        if tensor.datatype != spec.dtype and {tensor.datatype, spec.dtype} <= DTYPES.keys() and index < len(raw):
            given = np.frombuffer(raw[index], DTYPES[tensor.datatype])
            converted = given.astype(DTYPES[spec.dtype])
            if (converted.astype(given.dtype) == given).all() and (converted < 0).sum() == (given < 0).sum():
                raw[index], tensor.datatype = converted.tobytes(), spec.dtype
    return bytes(request.SerializeToString())


class OldClientPort:
    """Listens on `address` and passes every call on to the server at `target`, both HOST:PORT; a context manager.

    Raises:
        ServerError: the port can't be opened.
    """

    def __init__(self, address: str, target: str) -> None:
        self.address = address
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._is_open = threading.Event()
        self._is_closing: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="old clients", daemon=True)
        self._thread.start()
        self._is_open.wait(START_TIMEOUT_S)
        if self._error is not None or not self._is_open.is_set():
            raise ServerError(f"port {address} for old clients can't be opened: {self._error}; choose another")

    def __enter__(self) -> OldClientPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the calls under way and close the port."""
        if self._is_closing is not None:
            self._loop.call_soon_threadsafe(self._is_closing.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._error = error
            self._is_open.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._is_closing = asyncio.Event()
        async with grpc.aio.insecure_channel(self._target, options=OWN_CONNECTION) as channel:
            server = grpc.aio.server(options=UNLIMITED)
            server.add_generic_rpc_handlers((_Relay(channel),))
            port = server.add_insecure_port(self.address)
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
            await server.start()
            self._is_open.set()
            await self._is_closing.wait()
            await server.stop(GRACE_S)


class _Relay(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Passes each call on; a call with one message each way is a stream of one."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def service(self, details: Any) -> Any:
        method = details.method

        async def relay(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async def sent() -> AsyncIterator[bytes]:
                async for message in messages:
                    yield adapted(message) if method in INFER_METHODS else message

            metadata = [(key, value) for key, value in context.invocation_metadata() if key != "user-agent"]
            call = self._channel.stream_stream(method)(sent(), metadata=metadata, timeout=context.time_remaining())
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as error:
                with contextlib.suppress(asyncio.CancelledError):
                    await context.abort(error.code(), error.details() or "")
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(relay)
