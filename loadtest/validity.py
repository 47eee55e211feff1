"""Validity of a run: observations of the load generator in, verdicts out.

A load generator that is too slow measures itself, and a report that loses requests makes the server look better. A run
that fails one of these checks is invalid, whatever its figures are.

One rule gives the limits of times: the measurement's overhead must stay below a tenth of the reported figure
(TOLERANCE). So the limits scale with the figures: an overhead of 10 ms doesn't matter in an answer of 10 s, and
falsifies one of 20 ms. Counts have no tolerance: every request must be sent, answered and counted exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseek_triton.loadtest import usage
from deepseek_triton.loadtest.measure import counted, percentile
from deepseek_triton.loadtest.metrics import Reading, has_restarted, work
from deepseek_triton.loadtest.sample import Sample
from deepseek_triton.loadtest.usage import Usage
from deepseek_triton.loadtest.verdict import Verdict

TOLERANCE = 0.1  # largest share of measurement overhead in a reported figure
# The generator is one thread. If it is busy for a share r of the time, an event waits on average r / (1 - r) times as
# long as its handling takes: once as long at 50 %, nine times as long at 90 %.
MAX_GENERATOR_SHARE = 0.5
GENERATOR_STRETCH_S = 5.0  # length of the busiest period; shorter bursts appear as lag of the event loop


@dataclass(frozen=True)
class Observed:
    """The observations of a run."""

    samples: Sequence[Sample]  # includes those of the warm-up
    tokens: Mapping[int, int]  # whole second → tokens that arrived in it
    num_scheduled: int | None  # first requests that should have been sent; None: closed users send when they can
    num_first_sent: int  # first requests of conversations that were sent
    num_begun: int  # requests that were begun
    num_bugs: int  # exceptions other than a client's errors
    lags_s: Sequence[float]  # delay of the event loop, measured every tenth of a second
    usage: Sequence[Usage]  # of this machine's processors
    cores: int  # of this machine
    is_server_here: bool  # the server runs on this machine
    may_be_shared: bool  # the use of other programs is recorded, but doesn't make the run invalid
    readings: Sequence[Reading]  # of the server's counters; empty: they couldn't be read
    num_missed_readings: int
    model: str


def check(observed: Observed) -> list[Verdict]:
    """Every check that applies to the run."""
    return [
        *_check_answers(observed),
        *_check_generator(observed),
        *(_check_schedule(observed) if observed.num_scheduled is not None else ()),
        *_check_machine(observed),
        *(_check_server(observed) if observed.readings else ()),
    ]


def _check_answers(observed: Observed) -> list[Verdict]:
    return [
        Verdict(
            "requests counted are missing",
            float(not any(sample.is_complete for sample in counted(observed.samples))),
            0,
            "",
            "without one complete answer after the warm-up there is nothing to measure",
        ),
        Verdict(
            "requests begun without a result",
            float(observed.num_begun - len(observed.samples)),
            0,
            "requests",
            "the report would hide how they ended",
        ),
        Verdict(
            "exceptions in the generator", float(observed.num_bugs), 0, "", "see the log: these are bugs of its own"
        ),
    ]


def _check_generator(observed: Observed) -> list[Verdict]:
    share = usage.highest_generator_core(observed.usage, GENERATOR_STRETCH_S)
    verdicts = [
        Verdict(
            f"load generator's CPU, of one core, busiest {GENERATOR_STRETCH_S:g} s",
            None if share is None else 100 * share,
            100 * MAX_GENERATOR_SHARE,
            "%",
            "the generator was the bottleneck: lower the level, or give it a machine of its own",
        )
    ]
    # The median lag is contained in every figure, the rare longest lags in the high percentiles.
    for name, rank in (("median", 50), ("99th percentile", 99)):
        verdicts.append(
            Verdict(
                f"event loop's lag, {name}",
                percentile(observed.lags_s, rank),
                TOLERANCE * _first_response_s(observed.samples, rank),
                "s",
                f"times were read off late: more than a tenth of the first response's {name} is the generator's own",
            )
        )
    return verdicts


def _check_schedule(observed: Observed) -> list[Verdict]:
    assert observed.num_scheduled is not None
    return [
        Verdict(
            "requests sent late, 99th percentile",
            percentile([sample.late_s for sample in counted(observed.samples)], 99),
            TOLERANCE * _first_response_s(observed.samples, 99),
            "s",
            "more than a tenth of the first response's 99th percentile went by before the request was sent",
        ),
        Verdict(
            "scheduled requests not sent, or sent twice",
            float(abs(observed.num_scheduled - observed.num_first_sent)),
            0,
            "requests",
            "the load was not the profile's",
        ),
    ]


def _first_response_s(samples: Sequence[Sample], rank: float) -> float:
    """The shortest figure of those measured from when a request is due; 0 if nothing was answered.

    This is the time to first token or, without streams, the latency.
    """
    complete = [sample for sample in counted(samples) if sample.is_complete]
    streams = [wait for sample in complete if (wait := sample.first_token_s) is not None]
    return percentile(streams or [sample.latency_s for sample in complete], rank) or 0.0


def _check_machine(observed: Observed) -> list[Verdict]:
    """Other programs slow server and generator by at least their share of the processors."""
    if len(observed.usage) < 2:
        return []
    first, last = observed.usage[0], observed.usage[-1]
    part = usage.shares(first, last, observed.cores, is_server_here=observed.is_server_here)
    if part is None or part.others is None:
        return []  # the server's processes can't be read, so its share and that of other programs are unknown
    return [
        Verdict(
            "CPU taken by other programs, of the whole machine",
            100 * part.others,
            100 if observed.may_be_shared else 100 * TOLERANCE,
            "%",
            "the figures are of a machine that did something else too: run it again when it is quiet",
        )
    ]


def _check_server(observed: Observed) -> list[Verdict]:
    readings = observed.readings
    served = work(readings[0], readings[-1]).get(observed.model)
    answered = sum(sample.num_responses > 0 for sample in observed.samples)
    return [
        Verdict(
            "server or model restarts",
            float(has_restarted(readings)),
            0,
            "",
            "its counters went back: what it did before is lost",
        ),
        Verdict(
            "requests of others",
            max(served.requests - len(observed.samples), 0.0) if served else float(answered > 0),
            0,
            "requests",
            "the server answered more than was sent here: its load was not the profile's",
        ),
        Verdict(
            "readings of the server's counters missed",
            float(observed.num_missed_readings),
            max(1.0, TOLERANCE * len(readings)),
            "",
            "its part of the report has holes",
        ),
    ]
