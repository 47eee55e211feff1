"""Parses Triton's /metrics and computes what each model did between two readings.

A decoupled engine's `execute` only queues requests, so Triton's compute times and batch sizes don't include the work of
its loop. Metrics that such a model publishes itself are kept unchanged for `loadtest/engine.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepseek_triton.loadtest.histogram import HistogramSnapshot

# Our name → Triton's counters whose sum it is. Triton's times are in microseconds.
COUNTERS: dict[str, tuple[str, ...]] = {
    "successes": ("nv_inference_request_success",),
    "failures": ("nv_inference_request_failure",),
    "inferences": ("nv_inference_count",),
    "executions": ("nv_inference_exec_count",),
    "request_us": ("nv_inference_request_duration_us",),
    "queue_us": ("nv_inference_queue_duration_us",),
    "compute_us": (
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
    ),
}
FIGURES = ("batch_size", "queue_ms", "compute_ms")
TRITONS = "nv_"  # prefix of the names of Triton's metrics
_OURS = {theirs: ours for ours, group in COUNTERS.items() for theirs in group}

Values = Mapping[str, Mapping[str, float]]  # model → name → value


@dataclass(frozen=True)
class Reading:
    """One reading of /metrics, summed over versions, devices and reasons."""

    at_s: float
    counters: Values  # Triton's, by our names
    own_counters: Values = field(default_factory=dict)  # of the models' own, without the ending _total
    gauges: Values = field(default_factory=dict)  # of the models' own
    histograms: Mapping[str, Mapping[str, HistogramSnapshot]] = field(default_factory=dict)  # of the models' own


def parse(text: str, at_s: float) -> Reading:
    """Parse Prometheus' text format; raises ValueError if it is malformed."""
    from prometheus_client.parser import text_string_to_metric_families

    counters: dict[str, dict[str, float]] = {}
    own: dict[str, dict[str, float]] = {}
    gauges: dict[str, dict[str, float]] = {}
    buckets: dict[tuple[str, str], dict[float, float]] = {}

    def add(kind: dict[str, dict[str, float]], model: str, name: str, value: float) -> None:
        values = kind.setdefault(model, {})
        values[name] = values.get(name, 0.0) + value

    for family in text_string_to_metric_families(text):
        # Use the family's name: the parser appends _total to the sample names of counters.
        name = family.name
        for sample in family.samples:
            model = sample.labels.get("model")
            if model is None:
                continue
            if name.startswith(TRITONS):
                if ours := _OURS.get(name):
                    add(counters, model, ours, sample.value)
            elif family.type == "gauge":
                add(gauges, model, name, sample.value)
            elif "le" in sample.labels and name.endswith("_bucket"):
                bound = float(sample.labels["le"].replace("+Inf", "inf"))
                series = buckets.setdefault((model, name.removesuffix("_bucket")), {})
                series[bound] = series.get(bound, 0.0) + sample.value
            else:
                add(own, model, name, sample.value)
    return Reading(at_s, counters, own, gauges, _histograms(buckets, own))


def _histograms(
    buckets: Mapping[tuple[str, str], Mapping[float, float]], counters: Values
) -> dict[str, dict[str, HistogramSnapshot]]:
    """Return the complete histograms; one without its sum or its infinite bucket is left out."""
    result: dict[str, dict[str, HistogramSnapshot]] = {}
    for (model, name), series in buckets.items():
        total = counters.get(model, {}).get(f"{name}_sum")
        if total is not None and math.inf in series:
            bounds = tuple(sorted(series))
            result.setdefault(model, {})[name] = HistogramSnapshot(
                bounds, tuple(series[bound] for bound in bounds), total
            )
    return result


@dataclass(frozen=True)
class ModelWork:
    """What one model did between two readings. None: the divisor is 0."""

    requests: float
    failures: float
    executions: float
    batch_size: float | None  # inferences an execution
    queue_ms: float | None  # a request
    compute_ms: float | None  # a request: input, inference and output
    request_ms: float | None  # a request, whole


def work(before: Reading, after: Reading) -> dict[str, ModelWork]:
    """Return what each model did between two readings."""
    result = {}
    for model, counters in after.counters.items():
        earlier = before.counters.get(model, {})
        done = {name: counters.get(name, 0.0) - earlier.get(name, 0.0) for name in COUNTERS}
        result[model] = ModelWork(
            requests=done["successes"],
            failures=done["failures"],
            executions=done["executions"],
            batch_size=_ratio(done["inferences"], done["executions"]),
            queue_ms=_ratio(done["queue_us"] / 1e3, done["successes"]),
            compute_ms=_ratio(done["compute_us"] / 1e3, done["successes"]),
            request_ms=_ratio(done["request_us"] / 1e3, done["successes"]),
        )
    return result


def has_restarted(readings: Sequence[Reading]) -> bool:
    """Return whether a counter decreased between two readings: the server or a model has restarted."""
    return any(
        later.get(model, {}).get(name, 0.0) < value
        for a, b in itertools.pairwise(readings)
        for earlier, later in ((a.counters, b.counters), (a.own_counters, b.own_counters))
        for model, counters in earlier.items()
        for name, value in counters.items()
    )


def nearest(readings: Sequence[Reading], edges: Sequence[float]) -> list[Reading]:
    """Return the reading nearest to each edge, so values may be off by the work between two readings."""
    times = np.array([reading.at_s for reading in readings])
    return [readings[int(np.abs(times - edge).argmin())] for edge in edges]


def course(readings: Sequence[Reading], edges: Sequence[float]) -> dict[str, dict[str, list[float | None]]]:
    """Return model → name in FIGURES → its value between each two of `edges`."""
    if not readings:
        return {}
    steps = [work(a, b) if b.at_s > a.at_s else {} for a, b in itertools.pairwise(nearest(readings, edges))]
    return {
        model: {name: [getattr(step[model], name) if model in step else None for step in steps] for name in FIGURES}
        for model in readings[-1].counters
    }


def gauge_course(readings: Sequence[Reading], model: str, gauge: str, edges: Sequence[float]) -> list[float | None]:
    """Return a gauge's mean between each two of `edges`."""
    return [
        mean(
            value
            for reading in readings
            if low <= reading.at_s < high and (value := reading.gauges.get(model, {}).get(gauge)) is not None
        )
        for low, high in itertools.pairwise(edges)
    ]


def _ratio(value: float, by: float) -> float | None:
    return value / by if by > 0 else None


def mean(values: Iterable[float]) -> float | None:
    """Return the mean; None if there are no values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
