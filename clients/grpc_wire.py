"""What gRPC clients send and receive: protobuf messages with tensors in raw form, and what status codes mean.

Synchronous and asyncio clients share it; it opens no connection. `import grpc` is the grpcio package: inside a package,
Python's imports are absolute.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
    rejection,
)
from deepseek_triton.clients.life import Response, StreamCall, TensorCall
from deepseek_triton.clients.score import Tensor
from deepseek_triton.ensemble.protocol.contract import DType, TensorSpec
from deepseek_triton.ensemble.protocol.error_kind import KIND_PARAMETER

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A connection for each client, not one for each address and process.
    ("grpc.use_local_subchannel_pool", 1),
    # After a failed connection, try again soon: by default a client that waits for its server to start would
    # be blind for up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Nor is a name that now stands for another address resolved for half a minute by default.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # An inference server is reached directly, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
]

_ERRORS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
    grpc.StatusCode.CANCELLED: ClientError,  # by our own close()
}
# One element, little-endian; STRING travels as BYTES: a uint32 length, then UTF-8.
_LAYOUTS: dict[DType, str] = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f"}


def check_url(url: str) -> None:
    """Refuse what is no address for gRPC."""
    if "/" in url or ":" not in url:
        raise ValueError(f"url must be host:port for gRPC, got {url!r}")


def stream_message(call: StreamCall) -> Any:
    """The ModelInferRequest of a streamed request; it asks for errors with their kind.

    Every model of ours has a batch dimension: [n] is [1, n] here.
    """
    tensors = {}
    for spec, value in call.inputs.items():
        values = value if isinstance(value, tuple) else (value,)
        tensors[spec] = Tensor((1, len(values)), values)
    return _message(call.model, call.request_id, tensors, {**call.parameters, KIND_PARAMETER: "true"})


def tensor_message(call: TensorCall) -> Any:
    """The ModelInferRequest of whole tensors."""
    return _message(call.model, call.request_id, call.inputs, call.parameters)


def read_stream_response(response: Any, outputs: tuple[TensorSpec, ...]) -> Response:
    """The `outputs` that a ModelStreamInferResponse has. Raises `RequestRejected`, `ProtocolError`."""
    if response.error_message:
        raise rejection(response.error_message)
    return {name: list(tensor.values) for name, tensor in read_response(response.infer_response, outputs).items()}


def read_response(response: Any, outputs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """The `outputs` that a ModelInferResponse has; `ProtocolError` for one of another dtype or length."""
    contents = response.raw_output_contents
    if len(contents) != len(response.outputs):
        raise ProtocolError(f"a response must hold contents for {len(response.outputs)} outputs, got {len(contents)}")
    received = {tensor.name: (tensor, raw) for tensor, raw in zip(response.outputs, contents, strict=True)}
    tensors = {}
    for spec in outputs:
        if spec.name not in received:
            continue
        tensor, raw = received[spec.name]
        if tensor.datatype != _wire_dtype(spec):
            raise ProtocolError(f"output {spec.name} must be {_wire_dtype(spec)}, got {tensor.datatype}")
        values = decode(spec, raw)
        if len(values) != math.prod(tensor.shape):
            raise ProtocolError(f"output {spec.name} must be of shape {list(tensor.shape)}, got {len(values)} elements")
        tensors[spec.name] = Tensor(tuple(tensor.shape), values)
    return tensors


def client_error(error: Any, url: str, timeout_s: float) -> ClientError:
    """The `ClientError` that a grpc.RpcError means."""
    kind = _ERRORS.get(error.code(), RequestRejected)
    if kind is RequestTimeout:
        return RequestTimeout(f"no complete answer from {url} within {timeout_s:g} s")
    if kind is ServerUnavailable:
        return ServerUnavailable(f"no server at {url}, or the connection broke: {error.details()}")
    return kind(error.details())


def encode(spec: TensorSpec, values: Sequence[Any]) -> bytes:
    """The raw form of a tensor's values."""
    if spec.dtype != "STRING":
        return struct.pack(f"<{len(values)}{_LAYOUTS[spec.dtype]}", *values)
    texts = [value if isinstance(value, bytes) else value.encode() for value in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def decode(spec: TensorSpec, raw: bytes) -> list[Any]:
    """The values in a tensor's raw form. Raises `ProtocolError`."""
    try:
        if spec.dtype == "STRING":
            return list(_decode_strings(raw))
        return [value for (value,) in struct.iter_unpack(f"<{_LAYOUTS[spec.dtype]}", raw)]
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"output {spec.name} must be {spec.dtype}: {error}") from error


def _message(model: str, request_id: str, tensors: Mapping[TensorSpec, Tensor], parameters: Mapping[str, str]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, value in parameters.items():
        message.parameters[name].string_param = value
    for spec, tensor in tensors.items():
        message.inputs.add(name=spec.name, datatype=_wire_dtype(spec), shape=tensor.shape)
        message.raw_input_contents.append(encode(spec, tensor.values))
    return message


def _wire_dtype(spec: TensorSpec) -> str:
    return "BYTES" if spec.dtype == "STRING" else spec.dtype


def _decode_strings(raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        (size,) = struct.unpack_from("<I", raw, start)
        start += 4 + size
        if start > len(raw):
            raise struct.error(f"a string of {size} bytes doesn't fit")
        yield raw[start - size : start].decode()
