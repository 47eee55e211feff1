"""Triton's counters: text in, each model's work out."""

from __future__ import annotations

import math

import pytest

from deepseek_triton.loadtest.histogram import HistogramSnapshot
from deepseek_triton.loadtest.metrics import Reading, course, gauge_course, has_restarted, parse, work
from tests.support.loadtests import reading

TEXT = """# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="1"} 10
nv_inference_request_success{model="m",version="2"} 5
nv_inference_request_success{model="other",version="1"} 7
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="m",reason="OTHER",version="1"} 1
nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 2
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="1"} 40
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="m",version="1"} 8
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="m",version="1"} 90000
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="m",version="1"} 30000
# TYPE nv_inference_compute_input_duration_us counter
nv_inference_compute_input_duration_us{model="m",version="1"} 1000
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="m",version="1"} 50000
# TYPE nv_inference_compute_output_duration_us counter
nv_inference_compute_output_duration_us{model="m",version="1"} 9000
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="m",version="1"} 3
# TYPE slots_used gauge
slots_used{model="m",version="1"} 6
# TYPE tokens_total counter
tokens_total{model="m",version="1"} 20
# TYPE wait_seconds_bucket counter
wait_seconds_bucket{le="0.5",model="m",version="1"} 3
wait_seconds_bucket{le="+Inf",model="m",version="1"} 4
# TYPE wait_seconds_sum counter
wait_seconds_sum{model="m",version="1"} 2.5
# TYPE wait_seconds_count counter
wait_seconds_count{model="m",version="1"} 4
# TYPE half_seconds_bucket counter
half_seconds_bucket{le="0.5",model="m",version="1"} 3
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


def test_counters_are_added_up_by_model() -> None:
    read = parse(TEXT, 4.0)
    assert read.at_s == 4.0
    assert read.counters["m"] == {
        "successes": 15,
        "failures": 3,
        "inferences": 40,
        "executions": 8,
        "request_us": 90_000,
        "queue_us": 30_000,
        "compute_us": 60_000,
    }
    assert read.counters["other"] == {"successes": 7}
    assert read.gauges == {"m": {"slots_used": 6}}
    assert read.own_counters["m"]["tokens"] == 20
    assert read.histograms == {"m": {"wait_seconds": HistogramSnapshot((0.5, math.inf), (3, 4), 2.5)}}, (
        "half a one is none"
    )


def test_what_is_no_metrics_text_is_an_error() -> None:
    with pytest.raises(ValueError):
        parse("<html>not found</html>", 0.0)


def test_work_is_the_difference_of_two_readings() -> None:
    done = work(Reading(0.0, {"m": {"successes": 5, "queue_us": 10_000}}), parse(TEXT, 1.0))
    assert done["m"].requests == 10
    assert done["m"].batch_size == 5.0
    assert done["m"].queue_ms == 2.0
    assert done["m"].compute_ms == 6.0
    assert done["m"].request_ms == 9.0
    assert done["other"].batch_size is None, "nothing was executed"


def test_a_counter_that_goes_back_is_a_restart() -> None:
    assert not has_restarted([reading(0, 4), reading(1, 4), reading(2, 6)])
    assert has_restarted([reading(0, 4), reading(1, 6), reading(2, 2)])
    assert has_restarted([reading(0, 4), Reading(1, {})])
    assert has_restarted([Reading(0, {}, {"m": {"tokens": 5}}), Reading(1, {}, {"m": {"tokens": 4}})])


def test_the_course_follows_the_readings() -> None:
    readings = [
        reading(0.1, 0, slots=1),
        reading(1.0, 10, slots=5),
        reading(1.9, 10, slots=3),
        reading(3.1, 30, slots=0),
    ]
    steps = course(readings, [0, 1, 2, 3])
    assert steps["smollm2"]["queue_ms"] == [2.0, None, 2.0]
    assert steps["smollm2"]["batch_size"] == [2.0, None, 2.0]
    assert gauge_course(readings, "smollm2", "slots", [0, 1, 2, 3]) == [1.0, 4.0, None]
    assert gauge_course(readings, "smollm2", "other", [0, 1]) == [None]
    assert course([], [0, 1]) == {}
