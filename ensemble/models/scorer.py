"""Triton's adapter for the scorer: tokens' log-probabilities → the label and its probabilities.

A repository's model.py imports it. It translates tensors; the numbers are
`ensemble/scoring/calibration.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES, read_inputs
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration, label_scores, softmax
from deepseek_triton.ensemble.scoring.profile import ScoringProfile


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the profile and, where there is one, the calibration that lie beside this file."""
        directory = Path(args["model_repository"]) / args["model_version"]
        self._normalisation = ScoringProfile.load(directory).normalisation
        self._calibration = ProbabilityCalibration.load(directory)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score every request."""
        return [self._respond(read_inputs(request)) for request in requests]

    def _respond(self, inputs: dict[str, Any]) -> Any:
        results: dict[contract.TensorSpec, list[Any]] = {spec: [] for spec in contract.SCORE_RESULTS}
        rows = (inputs[spec.name] for spec in contract.SCORER.inputs)
        for log_probs, hidden, targets, labels in zip(*rows, strict=True):
            sums, scores = label_scores(log_probs, targets, len(labels), self._normalisation)
            # A calibration holds for its own labels in their order; other labels' scores stay uncalibrated.
            fitted = self._calibration
            is_calibrated = fitted is not None and fitted.labels == tuple(label.decode() for label in labels)
            if fitted is not None and is_calibrated:
                probabilities = fitted.probabilities(scores[None], hidden[None])[0]
            else:
                probabilities = softmax(scores)
            results[contract.LABEL].append([labels[int(probabilities.argmax())]])
            results[contract.PROBABILITIES].append(probabilities)
            results[contract.LOG_PROBS].append(sums)
            results[contract.IS_CALIBRATED].append([is_calibrated])
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(spec.name, np.array(values, NUMPY_DTYPES[spec.dtype])) for spec, values in results.items()]
        )
