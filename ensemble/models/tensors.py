"""Tensors of one Triton request as plain Python values.

A prompt's tensors have the shape [1, n]; a request of several prompts has a row for each. The objects of
`triton_python_backend_utils` are only duck-typed, so this is testable without a server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import DType, TensorSpec
from deepseek_triton.ensemble.protocol.error_kind import KIND_PARAMETER

NUMPY_DTYPES: dict[DType, Any] = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "STRING": np.object_,
}


PADDING_ID = -1  # fills up the ids of a request's shorter prompts; no token has it
GRPC_MARK = "user-agent"  # a header that the server passes on from gRPC alone (ensemble/server/tritonserver.py)
# The shapes that NVIDIA's clients read, where they aren't [1, n].
SHAPES: dict[str, tuple[int, ...]] = {contract.TEXT_OUTPUT.name: (-1,), contract.OUTPUT_LOG_PROBS.name: (1, 1, -1)}


class RequestError(ValueError):
    """The request's tensors are invalid; the message is one line for the client."""


def read_inputs(request: Any) -> dict[str, NDArray[Any]]:
    """Every tensor that the request has: name → array."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def scalar(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> Any:
    """The one value of tensor `spec`, or None where the request doesn't have it."""
    if spec.name not in inputs:
        return None
    values = inputs[spec.name].reshape(-1)
    if len(values) != 1:
        raise RequestError(f"{spec.name} holds {len(values)} values, must hold one")
    value = values[0]
    return value.item() if isinstance(value, np.generic) else value


def array(spec: TensorSpec, values: Any) -> NDArray[Any]:
    """`values` as an array of the tensor's dtype, [1, n] or as SHAPES says."""
    return np.asarray(values, dtype=NUMPY_DTYPES[spec.dtype]).reshape(SHAPES.get(spec.name, (1, -1)))


@dataclass(frozen=True)
class Row:
    """One prompt's tensors, [1, n] each, and its index in its request."""

    inputs: dict[str, NDArray[Any]]
    index: int = 0
    is_one_of_several: bool = False


def rows(inputs: dict[str, NDArray[Any]]) -> list[Row]:
    """The prompts of a request; Triton gives all its tensors the same number of rows."""
    num_prompts = max((len(values) for values in inputs.values()), default=1)
    if num_prompts == 1:
        return [Row(inputs)]
    return [
        Row({name: values[i : i + 1] for name, values in inputs.items()}, i, is_one_of_several=True)
        for i in range(num_prompts)
    ]


def padded(prompts: Sequence[Sequence[int] | NDArray[Any]]) -> NDArray[np.int32]:
    """The ids of several prompts as one array [prompts, longest]."""
    ids = np.full((len(prompts), max(map(len, prompts))), PADDING_ID, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids


def without_padding(ids: NDArray[Any]) -> NDArray[Any]:
    """A row of `padded` as it was."""
    is_token = ids != PADDING_ID
    return ids[: len(ids) - int(is_token[::-1].argmax())] if is_token.any() else ids[:0]


def parameters(request: Any) -> dict[str, Any]:
    """The request's parameters."""
    read: dict[str, Any] = json.loads(request.parameters() or "{}")
    return read


def asks_for_build(request: Any) -> bool:
    """Whether a request to a tokenizer wants the identity of its build instead of ids."""
    return contract.DESCRIBE_BUILD in parameters(request)


def came_over_grpc(request: Any) -> bool:
    """Whether the request is known to have come over gRPC; a server that passes no headers on doesn't say."""
    return GRPC_MARK in parameters(request)


def marks_kind(request: Any) -> bool:
    """Whether the caller wants the kind of an error before its text; no, where the parameters can't be read."""
    try:
        return KIND_PARAMETER in parameters(request)
    except ValueError:
        return False
