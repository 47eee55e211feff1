"""Whole tensors in gRPC's raw form, for requests that aren't streamed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from tritonclient.grpc import service_pb2

from deepseek_triton.clients.errors import ProtocolError
from deepseek_triton.clients.score import Tensor
from deepseek_triton.ensemble.protocol.contract import DType, TensorSpec

_CODES: dict[DType, str] = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f"}


def infer_message(model: str, request_id: str, inputs: Mapping[TensorSpec, Tensor]) -> Any:
    """The request that carries `inputs`."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for spec, tensor in inputs.items():
        datatype = "BYTES" if spec.dtype == "STRING" else spec.dtype
        message.inputs.add(name=spec.name, datatype=datatype, shape=tensor.shape)
        message.raw_input_contents.append(_encode(spec.dtype, tensor))
    return message


def read_response(response: Any, outputs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """The `outputs` that the response has; `ProtocolError` for one of another dtype or length."""
    specs = {spec.name: spec for spec in outputs}
    tensors = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if (spec := specs.get(tensor.name)) is None:
            continue
        if tensor.datatype != ("BYTES" if spec.dtype == "STRING" else spec.dtype):
            raise ProtocolError(f"output {spec.name} must be {spec.dtype}, got {tensor.datatype}")
        try:
            tensors[spec.name] = _decode(spec.dtype, tuple(tensor.shape), raw)
        except (struct.error, UnicodeDecodeError) as error:
            raise ProtocolError(f"output {spec.name} can't be decoded: {error}") from error
    return tensors


def _encode(dtype: DType, tensor: Tensor) -> bytes:
    if dtype != "STRING":
        return struct.pack(f"<{len(tensor.values)}{_CODES[dtype]}", *tensor.values)
    texts = [value.encode() for value in tensor.values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _decode(dtype: DType, shape: tuple[int, ...], raw: bytes) -> Tensor:
    if dtype != "STRING":
        return Tensor(shape, struct.unpack(f"<{prod(shape)}{_CODES[dtype]}", raw))
    texts, offset = [], 0
    while offset < len(raw):
        (size,) = struct.unpack_from("<I", raw, offset)
        texts.append(raw[offset + 4 : offset + 4 + size].decode())
        offset += 4 + size
    return Tensor(shape, texts)
