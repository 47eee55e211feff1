"""The one list of metric names that rules, alerts and dashboards may use.

An engine's own are those that `ensemble/engine/metrics.py` publishes, and the gateway's those of
`gateway/observe/metrics.py`. Triton's are those of its /metrics; the GPU's are there only on a machine that has one, so
that tests take them from a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from deepseek_triton.ensemble.engine.metrics import EngineMetrics, Histogram
from deepseek_triton.gateway.observe.metrics import GatewayMetrics

ENGINE_PREFIX = "deepseek_"
JOB, GATEWAY_JOB = "triton", "gateway"  # of the scrape configuration


@dataclass(frozen=True)
class Metric:
    """A metric family.

    source: "engine", "gateway", "triton", "gpu", "example" or "prometheus". kind: as Prometheus calls it.
    """

    name: str
    source: str
    kind: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query writes."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


def _engine() -> Iterator[Metric]:
    published = EngineMetrics()
    for field in fields(EngineMetrics):
        is_histogram = isinstance(getattr(published, field.name), Histogram)
        kind = "histogram" if is_histogram else "counter" if field.name.endswith("_total") else "gauge"
        yield Metric(ENGINE_PREFIX + field.name, "engine", kind)


def _gateway() -> Iterator[Metric]:
    for family in GatewayMetrics().registry.collect():
        yield Metric(f"{family.name}_total" if family.type == "counter" else family.name, "gateway", family.type)


METRICS = (
    *_engine(),
    *_gateway(),
    Metric("nv_inference_request_success", "triton", "counter"),
    Metric("nv_inference_request_failure", "triton", "counter"),
    Metric("nv_inference_count", "triton", "counter"),
    Metric("nv_inference_exec_count", "triton", "counter"),
    Metric("nv_inference_request_duration_us", "triton", "counter"),
    Metric("nv_inference_queue_duration_us", "triton", "counter"),
    Metric("nv_inference_compute_infer_duration_us", "triton", "counter"),
    Metric("nv_inference_pending_request_count", "triton", "gauge"),
    Metric("nv_cpu_utilization", "triton", "gauge"),
    Metric("nv_cpu_memory_total_bytes", "triton", "gauge"),
    Metric("nv_cpu_memory_used_bytes", "triton", "gauge"),
    Metric("nv_gpu_utilization", "gpu", "gauge"),
    Metric("nv_gpu_memory_total_bytes", "gpu", "gauge"),
    Metric("nv_gpu_memory_used_bytes", "gpu", "gauge"),
    Metric("nv_gpu_power_usage", "gpu", "gauge"),
    Metric("nv_gpu_power_limit", "gpu", "gauge"),
    Metric("nv_energy_consumption", "gpu", "counter"),
    # Of a scoring application that watches its inputs (examples/fraud)
    Metric("deepseek_drift_psi", "example", "gauge"),
    Metric("deepseek_drift_window_records", "example", "gauge"),
    Metric("up", "prometheus", "gauge"),
)
SERIES = {series: metric for metric in METRICS for series in metric.series}
_NAME = re.compile(r"\b(?:deepseek_\w+|gateway_\w+|nv_\w+|DCGM_\w+|up)\b(?!\s*:)")


def names_in(query: str) -> set[str]:
    """The metric names that a query of PromQL has; recorded names (level:metric:operation) aside."""
    return set(_NAME.findall(re.sub(r"[\w]+:[\w:]+", "", query)))
