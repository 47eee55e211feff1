"""Triton's adapter: numbers and hidden state → what each input added to the log-odds."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.examples.fraud.serving.contracts import EXPLANATION
from deepseek_triton.examples.fraud.serving.judge import load_model, tree_inputs


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load fraud.json."""
        self._model = load_model(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Explain every request's records."""
        responses = []
        for inputs in tree_inputs(self._model, requests):
            texts = [[explanation.to_json().encode()] for explanation in self._model.explain(inputs)]
            tensor = pb_utils.Tensor(EXPLANATION.name, np.array(texts, np.object_))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
