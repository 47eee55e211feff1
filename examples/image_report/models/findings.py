"""Triton's adapter between the two models: logits → the prompt and the schema of a report.

A repository's model.py imports it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import read_inputs
from deepseek_triton.ensemble.protocol.contract import MESSAGES
from deepseek_triton.examples.image_report.contract import GUIDE, GUIDE_TYPE, IMPRESSION_PARAMETER, LOGITS
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, TemperatureScaling
from deepseek_triton.examples.image_report.report import Impression, messages, schema


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the calibration that lies beside this file."""
        directory = Path(args["model_repository"]) / args["model_version"]
        self._calibration = TemperatureScaling.load(directory / CALIBRATION_FILE)
        parameters = json.loads(args["model_config"])["parameters"]
        self._impression: Impression = parameters[IMPRESSION_PARAMETER]["string_value"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Find out what each image shows."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            rows = [self._calibration.findings(row.tolist()) for row in read_inputs(request)[LOGITS.name]]
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        values = {
            MESSAGES: [messages(findings) for findings in rows],
            GUIDE_TYPE: ["json_schema"] * len(rows),
            GUIDE: [schema(findings, self._impression) for findings in rows],
        }
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(spec.name, np.array([[text.encode()] for text in texts], np.object_))
                for spec, texts in values.items()
            ]
        )
