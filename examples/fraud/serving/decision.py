"""Triton's adapter: numbers and hidden state → the label and its probability."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.examples.fraud.model import LABELS
from deepseek_triton.examples.fraud.serving.judge import load_model, tree_inputs


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load fraud.json."""
        self._model = load_model(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decide on every request's records."""
        return [self._respond(inputs) for inputs in tree_inputs(self._model, requests)]

    def _respond(self, inputs: NDArray[Any]) -> Any:
        probabilities = self._model.probabilities(inputs)
        is_fraud = probabilities[:, 1] >= self._model.threshold
        values = {
            contract.LABEL: [[LABELS[int(each)].encode()] for each in is_fraud],
            contract.PROBABILITIES: probabilities,
            contract.LOG_PROBS: np.log(np.maximum(probabilities, 1e-30)),
            contract.IS_CALIBRATED: np.ones((len(inputs), 1)),
            contract.SCORED_LABELS: [[label.encode() for label in LABELS]] * len(inputs),
        }
        tensors = [
            pb_utils.Tensor(spec.name, np.array(each, NUMPY_DTYPES[spec.dtype])) for spec, each in values.items()
        ]
        return pb_utils.InferenceResponse(tensors)
