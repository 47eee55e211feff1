"""Triton's adapter: watches how far the latest payments are from the training ones, and publishes it as metrics.

Gauges on Triton's /metrics, labelled with model and input: `deepseek_drift_psi` and `deepseek_drift_window_records`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deepseek_triton.examples.fraud.drift import DriftWindow
from deepseek_triton.examples.fraud.serving.contracts import DRIFT, NAME
from deepseek_triton.examples.fraud.serving.judge import load_model, tree_inputs

INTERVAL_S = 1.0  # between two computations of the PSI


class TritonPythonModel:
    """Answers each request with one response."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load fraud.json, and make the metrics."""
        self._model = load_model(args)
        self._window = DriftWindow(self._model.reference)
        kind = pb_utils.MetricFamily.GAUGE
        # A family must outlive its metrics: both are kept.
        self._psi_family = pb_utils.MetricFamily(
            "deepseek_drift_psi", "Population stability index of the latest records against the training ones", kind
        )
        self._records_family = pb_utils.MetricFamily(
            "deepseek_drift_window_records", "Records that deepseek_drift_psi is computed of", kind
        )
        names = self._model.reference.names
        self._psi = {name: self._psi_family.Metric(labels={"model": NAME, "input": name}) for name in names}
        self._records = self._records_family.Metric(labels={"model": NAME})
        self._largest, self._due = 0.0, 0.0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Add every request's records."""
        batch = tree_inputs(self._model, requests)
        for inputs in batch:
            self._window.add(self._model.drift_values(inputs))
        if time.monotonic() >= self._due:
            self._publish()
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(DRIFT.name, np.full((len(inputs), 1), self._largest, np.float32))]
            )
            for inputs in batch
        ]

    def finalize(self) -> None:
        """Let go of the metrics, then of their families: the backend's process crashes if its end finds them."""
        self._psi.clear()
        del self._records
        del self._psi_family, self._records_family

    def _publish(self) -> None:
        psi = self._window.psi()
        for name, value in psi.items():
            self._psi[name].set(value)
        self._records.set(self._window.num_records)
        self._largest, self._due = max(psi.values()), time.monotonic() + INTERVAL_S
