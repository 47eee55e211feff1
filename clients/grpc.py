"""The gRPC client: one `ModelStreamInfer` call for each request.

Decoupled models answer over gRPC only by the stream call. The generated stub is used rather than
`tritonclient.grpc.InferenceServerClient`, which holds one stream a client: a call each gives every request
its own deadline and cancellation, and lets any number of threads share one client.

`import grpc` below is the grpcio package: inside a package, Python's imports are absolute.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

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
from deepseek_triton.clients.tensors_grpc import infer_message, read_response
from deepseek_triton.ensemble.protocol.contract import DType, TensorSpec

# Little-endian layouts of one element; STRING travels as BYTES: a uint32 length, then UTF-8.
_LAYOUTS: dict[DType, str] = {"BOOL": "<?", "INT32": "<i", "INT64": "<q", "UINT64": "<Q", "FP32": "<f"}

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A connection for each client, not one for each address and process.
    ("grpc.use_local_subchannel_pool", 1),
    # After a failed connection, try again soon: by default a client that waits for its server to start would
    # be blind for up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
    # An inference server is reached directly, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
]

_ERRORS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
    grpc.StatusCode.CANCELLED: ClientError,  # by our own close()
}


class GrpcClient(BaseClient):
    """Calls a served model over gRPC, in plain text. Thread-safe: threads may share one client.

    `url` is `host:port`. `timeout_s` (seconds) is each request's deadline, exact to some milliseconds.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, model, timeout_s)
        if "/" in url or ":" not in url:
            raise ValueError(f"url must be host:port for gRPC, got {url!r}")
        self._channel = grpc.insecure_channel(url, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

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
        message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        for spec, value in inputs.items():
            values = value if isinstance(value, tuple) else (value,)
            # Every model of ours has a batch dimension: [n] is [1, n] here.
            message.inputs.add(name=spec.name, datatype=_wire_dtype(spec), shape=(1, len(values)))
            message.raw_input_contents.append(b"".join(_encode(spec, value) for value in values))
        # The request iterator ends after one message, so the server ends the call after the last response.
        call = self._stub.ModelStreamInfer(iter([message]), timeout=timeout_s)
        try:
            for response in call:
                if response.error_message:
                    raise RequestRejected(response.error_message)
                yield _decode_response(response.infer_response, outputs)
        except grpc.RpcError as error:
            raise self._translate(error, timeout_s) from error
        finally:
            call.cancel()  # nothing to a call that has ended

    def _infer(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[TensorSpec, Tensor],
        outputs: tuple[TensorSpec, ...],
        timeout_s: float,
    ) -> dict[str, Tensor]:
        message = infer_message(model, request_id, inputs)
        try:
            return read_response(self._stub.ModelInfer(message, timeout=timeout_s), outputs)
        except grpc.RpcError as error:
            raise self._translate(error, timeout_s) from error

    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        message = service_pb2.ModelReadyRequest(name=model)
        try:
            return bool(self._stub.ModelReady(message, timeout=timeout_s).ready)
        except grpc.RpcError as error:
            raise self._translate(error, timeout_s) from error

    def _close_transport(self) -> None:
        self._channel.close()

    def _translate(self, error: Any, timeout_s: float) -> ClientError:
        kind = _ERRORS.get(error.code(), RequestRejected)
        if kind is RequestTimeout:
            return RequestTimeout(f"no complete answer from {self.url} within {timeout_s:g} s")
        if kind is ServerUnavailable:
            return ServerUnavailable(f"no server at {self.url}, or the connection broke: {error.details()}")
        return kind(error.details())


def _wire_dtype(spec: TensorSpec) -> str:
    return "BYTES" if spec.dtype == "STRING" else spec.dtype


def _encode(spec: TensorSpec, value: Scalar) -> bytes:
    if isinstance(value, str):
        data = value.encode()
        return struct.pack("<I", len(data)) + data
    return struct.pack(_LAYOUTS[spec.dtype], value)


def _decode_response(response: Any, outputs: tuple[TensorSpec, ...]) -> dict[str, list[Scalar]]:
    """Read those of `outputs` that the response has."""
    contents = response.raw_output_contents
    if len(contents) != len(response.outputs):
        raise ProtocolError(f"a response must hold contents for {len(response.outputs)} outputs, got {len(contents)}")
    tensors = {tensor.name: (tensor, raw) for tensor, raw in zip(response.outputs, contents, strict=True)}
    decoded: dict[str, list[Scalar]] = {}
    for spec in outputs:
        if spec.name not in tensors:
            continue
        tensor, raw = tensors[spec.name]
        if tensor.datatype != _wire_dtype(spec):
            raise ProtocolError(f"output {spec.name} must be {_wire_dtype(spec)}, got {tensor.datatype}")
        values = _decode(spec, raw)
        if len(values) != math.prod(tensor.shape):
            raise ProtocolError(f"output {spec.name} must be of shape {list(tensor.shape)}, got {len(values)} elements")
        decoded[spec.name] = values
    return decoded


def _decode(spec: TensorSpec, raw: bytes) -> list[Scalar]:
    """Read the elements of a tensor."""
    try:
        if spec.dtype == "STRING":
            return list(_decode_strings(raw))
        return [value for (value,) in struct.iter_unpack(_LAYOUTS[spec.dtype], raw)]
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"output {spec.name} must be {spec.dtype}: {error}") from error


def _decode_strings(raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        (size,) = struct.unpack_from("<I", raw, start)
        start += 4 + size
        if start > len(raw):
            raise struct.error(f"a string of {size} bytes doesn't fit")
        yield raw[start - size : start].decode()
