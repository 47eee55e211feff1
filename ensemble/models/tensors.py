"""Tensors of one Triton request as plain Python values.

Every tensor here has the shape [1, n]: batching is for the models inside, a request is one prompt. The objects of
`triton_python_backend_utils` are only duck-typed, so this is testable without a server.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.protocol.contract import DType, TensorSpec

NUMPY_DTYPES: dict[DType, Any] = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "STRING": np.object_,
}


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
    """`values` as an array [1, n] of the tensor's dtype."""
    return np.asarray(values, dtype=NUMPY_DTYPES[spec.dtype]).reshape(1, -1)
