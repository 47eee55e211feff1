"""Triton's adapter for the ResNet on a CPU: pixels → logits. A repository's model.py imports it.

Its tensors are those of the plan that Triton's own tensorrt backend runs on a GPU. Triton collects requests into a
batch, and all of its images are computed together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import read_inputs
from deepseek_triton.examples.image_report.classifier import GRAPH_FILE, Classifier
from deepseek_triton.examples.image_report.contract import LOGITS, PIXELS


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph that lies beside this file."""
        directory = Path(args["model_repository"]) / args["model_version"]
        self._classifier = Classifier(directory / GRAPH_FILE, len(os.sched_getaffinity(0)))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Compute the images of all requests in one batch."""
        batches = [read_inputs(request)[PIXELS.name] for request in requests]
        logits = self._classifier.logits(np.concatenate(batches))
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(LOGITS.name, np.ascontiguousarray(part))])
            for part in np.split(logits, ends)
        ]
