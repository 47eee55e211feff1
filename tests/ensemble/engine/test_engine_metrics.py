"""The engine's metrics, and how they are published."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.engine.metrics import EngineMetrics, Histogram, descriptions
from deepseek_triton.ensemble.models import metrics as published
from deepseek_triton.ensemble.models.metrics import MetricsPublisher
from tests.support.fakes import FakeMetricFamilies

LABELS = {"model": "m", "version": "1"}
PREFIX = "deepseek_"


def publisher() -> tuple[EngineMetrics, FakeMetricFamilies, MetricsPublisher]:
    metrics, families = EngineMetrics(slots=4), FakeMetricFamilies()
    return metrics, families, MetricsPublisher(metrics, families, LABELS)


@pytest.mark.parametrize(("value", "index"), [(0.0, 0), (1.0, 0), (1.1, 1), (2.0, 1), (2.1, 2), (1e9, 2)])
def test_a_bound_belongs_to_its_bucket(value: float, index: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value, times=3)
    assert histogram.counts[index] == sum(histogram.counts) == 3 and histogram.total == 3 * value


def test_everything_that_is_counted_is_published_and_described() -> None:
    _, families, publish = publisher()
    publish.publish()
    histograms = {name for name in descriptions() if name.endswith("_seconds")}
    expected = {PREFIX + name for name in descriptions().keys() - histograms}
    expected |= {f"{PREFIX}{name}{suffix}" for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    assert set(families.kinds) == expected
    assert {name for name, kind in families.kinds.items() if kind == "gauge"} == {
        f"{PREFIX}slots", f"{PREFIX}slots_used", f"{PREFIX}sequences_waiting",
        f"{PREFIX}cache_blocks", f"{PREFIX}cache_blocks_free",
    }  # fmt: skip
    assert all(dict(labels).items() >= LABELS.items() for _, labels in families.values)
    assert families.value(f"{PREFIX}slots", **LABELS) == 4
    assert sum(families.values.values()) == 4, "all else is there, and 0"


@pytest.mark.slow
@given(st.lists(st.lists(st.floats(0, 100), max_size=8), max_size=5))
def test_a_histogram_is_what_prometheus_makes_of_one(rounds: list[list[float]]) -> None:
    metrics, families, publish = publisher()
    name = f"{PREFIX}queue_time_seconds"
    seen: list[float] = []
    for values in rounds:
        for value in values:
            metrics.queue_time_seconds.observe(value)
        seen += values
        publish.publish()
        buckets = families.series(f"{name}_bucket")
        assert list(buckets) == [*(f"{bound:g}" for bound in metrics.queue_time_seconds.bounds), "+Inf"]
        for le, count in buckets.items():
            assert count == sum(value <= float(le.replace("+Inf", "inf")) for value in seen)
        assert families.value(f"{name}_count", **LABELS) == buckets["+Inf"] == len(seen)
        assert families.value(f"{name}_sum", **LABELS) == pytest.approx(sum(seen))


def test_counters_grow_by_what_is_new_and_gauges_are_what_they_are() -> None:
    metrics, families, publish = publisher()
    for tokens, used in ((3, 2), (10, 4), (10, 0)):  # FakeMetric refuses a counter that falls
        metrics.generated_tokens_total, metrics.slots_used = tokens, used
        publish.publish()
        assert families.value(f"{PREFIX}generated_tokens_total", **LABELS) == tokens
        assert families.value(f"{PREFIX}slots_used", **LABELS) == used


def test_it_publishes_by_itself_and_a_last_time_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "INTERVAL_S", 0.005)
    metrics, families, publish = publisher()
    publish.start()
    metrics.requests_total = 1
    deadline = time.monotonic() + 60
    while families.value(f"{PREFIX}requests_total", **LABELS) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    monkeypatch.setattr(published, "INTERVAL_S", 3600)
    time.sleep(0.02)
    metrics.requests_total = 5
    publish.close()
    assert families.value(f"{PREFIX}requests_total", **LABELS) == 5
    assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_nothing_of_tritons_is_kept_after_the_end() -> None:
    """What the end of the backend's process finds of it ends that with a segmentation fault."""
    metrics, families = EngineMetrics(slots=4), FakeMetricFamilies()
    made = weakref.WeakSet[object]()

    class Families:
        COUNTER, GAUGE = families.COUNTER, families.GAUGE

        def __call__(self, **options: str) -> Any:
            family = families(**options)
            made.add(family)
            return family

    publish = MetricsPublisher(metrics, Families(), LABELS, has_trt_llm_names=True)
    publish.start()
    assert len(made) > 5
    publish.close()
    gc.collect()
    assert not made


def test_nvidias_names_are_published_where_they_are_asked_for() -> None:
    metrics, families, plain = publisher()
    plain.publish()
    assert not any(name.startswith("nv_") for name in families.kinds)
    metrics.slots_used, metrics.sequences_waiting = 1, 2
    families = FakeMetricFamilies()
    publish = MetricsPublisher(metrics, families, LABELS, has_trt_llm_names=True)
    publish.publish()
    publish.publish()
    requests, blocks = "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"
    kinds = {"active": 3, "scheduled": 1, "waiting": 2, "max": 4}
    assert {kind: families.value(requests, **LABELS, request_type=kind) for kind in kinds} == kinds
    fractions = {"max": 4, "used": 1, "free": 3, "fraction": 0.25}
    assert {kind: families.value(blocks, **LABELS, kv_cache_block_type=kind) for kind in fractions} == fractions
    running = "nv_trt_llm_inflight_batcher_metrics"
    assert families.value(running, **LABELS, inflight_batcher_specific_metric="generation_requests") == 1
    assert families.value("nv_trt_llm_general_metrics", **LABELS, general_type="timestamp") > 1e9
