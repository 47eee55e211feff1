"""Triton's adapter: records → the text for the language model, and the numbers for the trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import RequestError, read_inputs
from deepseek_triton.examples.fraud.records import RecordError
from deepseek_triton.examples.fraud.serving.contracts import NUMBERS, TEXT, record_from


class TritonPythonModel:
    """Answers each request, of one record or several, with one response."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Read every request's records; one with an invalid record gets its own error."""
        return [self._respond(read_inputs(request)) for request in requests]

    def _respond(self, inputs: dict[str, Any]) -> Any:
        try:
            for name, values in inputs.items():
                if values.ndim != 2 or values.shape[1] != 1:
                    raise RequestError(f"{name} has shape {list(values.shape)}, must be [records, 1]")
            count = max(map(len, inputs.values()), default=1)
            records = [record_from({name: values[i, 0] for name, values in inputs.items()}) for i in range(count)]
        except (RecordError, ValueError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        texts = np.array([[record.text().encode()] for record in records], np.object_)
        numbers = np.array([record.features() for record in records], np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor(TEXT.name, texts), pb_utils.Tensor(NUMBERS.name, numbers)])
