"""MetricsPublisher: an engine's metrics on Triton's own /metrics.

Every call of the Python backend's metrics is a round trip of some 30 µs to the server's process. Numbers are therefore
gathered in EngineMetrics, and their increases are published a few times a second. A histogram is published as the
series that Prometheus makes of one (`_bucket` with `le`, `_sum`, `_count`), each a counter, since the backend's own
histograms take one observation a call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_triton.ensemble.engine.metrics import EngineMetrics, Histogram, descriptions

log = logging.getLogger(__name__)
PREFIX = "deepseek_"
INTERVAL_S = 0.25


def _blocks(metrics: EngineMetrics) -> tuple[int, int]:
    """Blocks of the cache, all and used."""
    if metrics.cache_blocks:
        return metrics.cache_blocks, metrics.cache_blocks - metrics.cache_blocks_free
    return metrics.slots, metrics.slots_used


# The gauges of NVIDIA's tensorrtllm_backend that there is a number for: family → its label → the label's values.
# Without pages a slot counts as one block of the cache. `context` requests, memory and iterations aren't known here.
TRT_LLM_GAUGES: dict[str, tuple[str, dict[str, Callable[[EngineMetrics], float]]]] = {
    "nv_trt_llm_request_metrics": (
        "request_type",
        {
            "active": lambda m: m.slots_used + m.sequences_waiting,
            "scheduled": lambda m: m.slots_used,
            "waiting": lambda m: m.sequences_waiting,
            "max": lambda m: m.slots,
        },
    ),
    "nv_trt_llm_kv_cache_block_metrics": (
        "kv_cache_block_type",
        {
            "max": lambda m: _blocks(m)[0],
            "used": lambda m: _blocks(m)[1],
            "free": lambda m: _blocks(m)[0] - _blocks(m)[1],
            "fraction": lambda m: _blocks(m)[1] / max(_blocks(m)[0], 1),
        },
    ),
    "nv_trt_llm_inflight_batcher_metrics": (
        "inflight_batcher_specific_metric",
        {"generation_requests": lambda m: m.slots_used},
    ),
    "nv_trt_llm_general_metrics": ("general_type", {"timestamp": lambda m: time.time()}),
}


class MetricsPublisher:
    """Publishes `metrics` until it is closed.

    Args:
        family: pb_utils.MetricFamily. labels: the labels of every series.
        has_trt_llm_names: also publish TRT_LLM_GAUGES.
    """

    def __init__(
        self, metrics: EngineMetrics, family: Any, labels: Mapping[str, str], *, has_trt_llm_names: bool = False
    ) -> None:
        self._metrics = metrics
        self._family = family
        self._labels = dict(labels)
        self._trt_llm_gauges = TRT_LLM_GAUGES if has_trt_llm_names else {}
        self._published: dict[tuple[str, str], float] = {}
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, str], Any] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Publish now, then every INTERVAL_S seconds on a thread of its own."""
        self.publish()
        self._thread.start()

    def close(self) -> None:
        """Publish a last time, stop, and let go of the series: the backend's process crashes if its end finds them."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._series.clear()
        self._families.clear()

    def publish(self) -> None:
        """Bring every series up to date."""
        for name, help_text in descriptions().items():
            value = getattr(self._metrics, name)
            if isinstance(value, Histogram):
                self._publish_histogram(name, help_text, value)
            elif name.endswith("_total"):
                self._count(name, help_text, value)
            else:
                self._metric(name, help_text, "", self._family.GAUGE).set(value)
        for name, (label, values) in self._trt_llm_gauges.items():
            for kind, read in values.items():
                self._trt_llm_gauge(name, label, kind).set(read(self._metrics))

    def _run(self) -> None:
        while not self._is_closed.wait(INTERVAL_S):
            self.publish()
        self.publish()

    def _publish_histogram(self, name: str, help_text: str, histogram: Histogram) -> None:
        counts, total = list(histogram.counts), histogram.total
        cumulative = 0
        for bound, count in zip((*histogram.bounds, None), counts, strict=True):
            cumulative += count
            self._count(f"{name}_bucket", help_text, cumulative, "+Inf" if bound is None else f"{bound:g}")
        self._count(f"{name}_sum", help_text, total)
        self._count(f"{name}_count", help_text, cumulative)

    def _count(self, name: str, help_text: str, value: float, le: str = "") -> None:
        metric = self._metric(name, help_text, le, self._family.COUNTER)
        increase = value - self._published.get((name, le), 0)
        if increase > 0:
            metric.increment(increase)
            self._published[name, le] = value

    def _metric(self, name: str, help_text: str, le: str, kind: Any) -> Any:
        if (name, le) not in self._series:
            if name not in self._families:
                self._families[name] = self._family(name=PREFIX + name, description=help_text, kind=kind)
            labels = {**self._labels, "le": le} if le else self._labels
            self._series[name, le] = self._families[name].Metric(labels=labels)
        return self._series[name, le]

    def _trt_llm_gauge(self, name: str, label: str, kind: str) -> Any:
        if (name, kind) not in self._series:
            if name not in self._families:
                description = f"As in NVIDIA's tensorrtllm_backend, by {label}"
                self._families[name] = self._family(name=name, description=description, kind=self._family.GAUGE)
            self._series[name, kind] = self._families[name].Metric(labels={**self._labels, label: kind})
        return self._series[name, kind]
