"""Triton's own counters: the text of /metrics in, what each model did between two readings out.

A decoupled engine's `execute` only queues: what its loop does afterwards is in none of Triton's compute times, and its
in-flight batch is in none of the batch sizes. What such a model shows of itself are its own gauges, which are kept too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Ours → Triton's counters that are added up. Times are in microseconds there.
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
PENDING = "nv_inference_pending_request_count"
_OURS = {theirs: ours for ours, group in COUNTERS.items() for theirs in group}


@dataclass(frozen=True)
class Reading:
    """One reading: model → counter → value. Versions, devices and reasons are added up."""

    at_s: float
    counters: Mapping[str, Mapping[str, float]]
    gauges: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # pending, and those of the models' own


def parse(text: str, at_s: float) -> Reading:
    """Read Prometheus' text format. Raises `ValueError` for anything else."""
    from prometheus_client.parser import text_string_to_metric_families

    counters: dict[str, dict[str, float]] = {}
    gauges: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            model = sample.labels.get("model")
            if model is None:
                continue
            # The family's name, for the parser ends the samples' of counters in _total where the text has none.
            if ours := _OURS.get(family.name):
                values = counters.setdefault(model, {})
                values[ours] = values.get(ours, 0.0) + sample.value
            elif family.type == "gauge" and (family.name == PENDING or not family.name.startswith("nv_")):
                values = gauges.setdefault(model, {})
                values[family.name] = values.get(family.name, 0.0) + sample.value
    return Reading(at_s, counters, gauges)


@dataclass(frozen=True)
class ModelWork:
    """What one model did in a stretch of time. None: nothing to divide by."""

    requests: float
    failures: float
    executions: float
    batch_size: float | None  # inferences an execution
    queue_ms: float | None  # a request
    compute_ms: float | None  # a request: input, inference and output
    request_ms: float | None  # a request, whole


def work(before: Reading, after: Reading) -> dict[str, ModelWork]:
    """What each model did between two readings."""
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
    """Whether a counter went back between two readings: the server, or a model, began anew."""
    return any(
        later.counters.get(model, {}).get(name, 0.0) < value
        for earlier, later in itertools.pairwise(readings)
        for model, counters in earlier.counters.items()
        for name, value in counters.items()
    )


def course(readings: Sequence[Reading], edges: Sequence[float]) -> dict[str, dict[str, list[float | None]]]:
    """Model → figure → its value between each two of `edges`.

    The readings nearest to the borders are compared, so a step's figures may be off by one reading's work.
    """
    if not readings:
        return {}
    times = np.array([reading.at_s for reading in readings])
    nearest = [readings[int(np.abs(times - edge).argmin())] for edge in edges]
    steps = [work(a, b) if b.at_s > a.at_s else {} for a, b in itertools.pairwise(nearest)]
    figures = ("batch_size", "queue_ms", "compute_ms")
    result: dict[str, dict[str, list[float | None]]] = {
        model: {name: [getattr(step[model], name) if model in step else None for step in steps] for name in figures}
        for model in readings[-1].counters
    }
    for model, gauge in sorted(
        {(model, gauge) for r in readings for model, values in r.gauges.items() for gauge in values}
    ):
        result.setdefault(model, {})[gauge] = [
            _mean(
                reading.gauges[model][gauge]
                for reading in readings
                if low <= reading.at_s < high and gauge in reading.gauges.get(model, {})
            )
            for low, high in itertools.pairwise(edges)
        ]
    return result


def _ratio(value: float, by: float) -> float | None:
    return value / by if by > 0 else None


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
