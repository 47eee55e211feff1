"""Samples and results of load tests, made by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from deepseek_triton.loadtest import engine, profile
from deepseek_triton.loadtest.histogram import HistogramSnapshot
from deepseek_triton.loadtest.metrics import Reading
from deepseek_triton.loadtest.profile import LoadProfile
from deepseek_triton.loadtest.result import LoadTestResult, assemble
from deepseek_triton.loadtest.sample import Sample
from deepseek_triton.loadtest.target import ServerUnderTest
from deepseek_triton.loadtest.usage import Usage
from deepseek_triton.loadtest.validity import Observed

TARGET = ServerUnderTest.at("smollm2", "localhost")
PROFILE: dict[str, Any] = {
    "name": "test",
    "description": "A test",
    "arrivals": "open",
    "seed": 7,
    "warmup_s": 5,
    "timeout_s": 30,
    "stages": [{"seconds": 40, "start": 2, "end": 2}],
    "requests": {
        "form": "text",
        "prompt_words": {"median": 10, "sigma": 0.5, "least": 2, "most": 50},
        "answer_tokens": {"median": 20, "sigma": 0.5, "least": 2, "most": 50},
    },
    "protocols": {"grpc-stream": 1},
}


def make_profile(**changes: Any) -> LoadProfile:
    return profile.from_dict(PROFILE | changes)


def sample(due_s: float = 0.0, *, latency_s: float = 1.0, first_s: float | None = 0.2, **changes: Any) -> Sample:
    """A streamed answer of 5 tokens, due at `due_s` and sent then; `first_s` and `latency_s` are after that."""
    whole = Sample(
        protocol="grpc-stream",
        due_s=due_s,
        sent_s=due_s,
        first_s=None if first_s is None else due_s + first_s,
        end_s=due_s + latency_s,
        num_input_tokens=10,
        num_output_tokens=5,
        num_first_tokens=1,
        num_responses=5,
        max_gap_s=0.3,
        finish_reason="length",
        error="",
    )
    return dataclasses.replace(whole, **changes)


def failed(due_s: float = 0.0, **changes: Any) -> Sample:
    changes = {"num_output_tokens": 0, "finish_reason": "", "error": "RequestTimeout: too slow", **changes}
    return sample(due_s, first_s=None, **changes)


def observed(seen: Sequence[Sample], **changes: Any) -> Observed:
    """A run without fault."""
    whole = Observed(
        samples=seen,
        tokens={},
        num_scheduled=len(seen),
        num_first_sent=len(seen),
        num_begun=len(seen),
        num_bugs=0,
        lags_s=[0.001] * 10,
        usage=(usage(-6.0), usage(46.0, generator_s=5.0, server_s=40.0, others_s=2.0)),
        cores=2,
        is_server_here=True,
        may_be_shared=False,
        readings=(),
        num_missed_readings=0,
        model="smollm2",
    )
    return dataclasses.replace(whole, **changes)


def usage(at_s: float, generator_s: float = 0.0, server_s: float | None = 0.0, others_s: float = 0.0) -> Usage:
    """One reading of the machine: CPU seconds since the run's start, of a server of 400 MiB."""
    busy_s = 1000.0 + generator_s + (server_s or 0.0) + others_s
    return Usage(at_s, busy_s, generator_s, server_s, None if server_s is None else 400 * 2**20)


def histogram(values: Sequence[float]) -> HistogramSnapshot:
    """Observations in buckets of 0.1, 0.5, 1 and more."""
    bounds = (0.1, 0.5, 1.0, math.inf)
    return HistogramSnapshot(
        bounds, tuple(float(sum(v <= bound for v in values)) for bound in bounds), float(sum(values))
    )


def engine_reading(at_s: float, waits: Sequence[float], tokens: int = 5, gap_s: float = 0.2) -> Reading:
    """`reading`'s, of an engine that has answered requests of `tokens` tokens, `waits` (s) each until the first.

    A tenth of a wait was for a slot, and between two tokens it was always `gap_s`. Four of its eight slots are used.
    """
    count = len(waits)
    own = {"deepseek_requests": count, "deepseek_generated_tokens": count * tokens}
    gauges = {"deepseek_slots": 8.0, "deepseek_slots_used": 4.0, "deepseek_sequences_waiting": 2.0}
    histograms = {
        engine.FIRST_TOKEN: histogram(waits),
        engine.QUEUE: histogram([wait / 10 for wait in waits]),
        engine.INTER_TOKEN: histogram([gap_s] * (tokens - 1) * count),
    }
    counters = reading(at_s, count).counters
    return Reading(at_s, counters, {"smollm2": own}, {"smollm2": gauges}, {"smollm2": histograms})


def reading(at_s: float, count: float, **gauges: float) -> Reading:
    """The counters of one model that has had `count` requests of 2 ms queue and 6 ms compute, in batches of two."""
    counters = {
        "successes": count,
        "failures": 0.0,
        "inferences": count,
        "executions": count / 2,
        "request_us": count * 9000,
        "queue_us": count * 2000,
        "compute_us": count * 6000,
    }
    return Reading(at_s, {"smollm2": counters}, gauges={"smollm2": gauges} if gauges else {})


def missed_but_for_time(result: LoadTestResult) -> list[str]:
    """The checks that a run misses, without those of the generator's own times: a busy machine may spoil these."""
    of_time = ("event loop's lag, ", "requests sent late, ", "scheduled requests not sent, ")
    return [check.name for check in result.checks if not check.is_met and not check.name.startswith(of_time)]


def make_result(samples: Sequence[Sample], run: LoadProfile | None = None, **changes: Any) -> LoadTestResult:
    machine = {"processor": "a processor", "cores": 2, "memory_gib": 24.0}
    return assemble(run or make_profile(), TARGET, "2026-11-24T05:00:00+00:00", machine, observed(samples, **changes))
