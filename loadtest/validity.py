"""Whether a run may be believed: what was seen of the generator itself in, verdicts out.

A load generator that is itself too slow measures itself, and a report that loses requests flatters the server. A run
that fails one of these checks is invalid whatever its figures are, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.measure import counted, percentile
from loadtest.metrics import Reading, has_restarted, work
from loadtest.sample import Sample
from loadtest.verdict import Verdict

# Locust's own warning comes at this: of one core, over five seconds.
MAX_CPU_PERCENT = 90.0
# What comes is read off late by the loop's lag: the usual lag biases every figure, the rare ones the tails. People
# notice a tenth of a second.
MAX_MEDIAN_LAG_S = 0.005
MAX_P99_LAG_S = 0.1
MAX_LATE_S = 0.1


@dataclass(frozen=True)
class Observed:
    """What was seen of the generator during a run."""

    samples: Sequence[Sample]  # all, the warm-up's too
    tokens: Mapping[int, int]  # whole second → tokens that came in it
    num_scheduled: int | None  # first requests that should have been sent; None: closed users send when they can
    num_first_sent: int  # first requests of conversations that were sent
    num_begun: int  # requests that were begun
    num_bugs: int  # exceptions that are no client's error
    lags_s: Sequence[float]  # by how much the event loop woke late, once each tenth of a second
    cpu_percent: Sequence[float]  # the generator's, of one core, over five seconds each
    readings: Sequence[Reading]  # of the server's counters; none: they couldn't be had
    num_missed_readings: int
    model: str


def check(observed: Observed) -> list[Verdict]:
    """Every check that can be made of a run."""
    samples = counted(observed.samples)
    verdicts = [
        Verdict(
            "requests counted are missing",
            float(not any(sample.is_complete for sample in samples)),
            0,
            "",
            "without one complete answer after the warm-up there is nothing to measure",
        ),
        Verdict(
            "load generator's CPU, highest",
            max(observed.cpu_percent, default=None),
            MAX_CPU_PERCENT,
            "%",
            "the generator was the bottleneck: lower the level, or give it a machine of its own",
        ),
        *(
            Verdict(
                f"event loop's lag, {name}",
                percentile(observed.lags_s, rank),
                limit,
                "s",
                "times were read off late by this much: the machine, or the generator, was too busy",
            )
            for name, rank, limit in (("median", 50, MAX_MEDIAN_LAG_S), ("99th percentile", 99, MAX_P99_LAG_S))
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
    if observed.num_scheduled is not None:
        verdicts += [
            Verdict(
                "requests sent late, 99th percentile",
                percentile([sample.late_s for sample in samples], 99),
                MAX_LATE_S,
                "s",
                "the generator couldn't keep to its schedule",
            ),
            Verdict(
                "scheduled requests not sent, or sent twice",
                float(abs(observed.num_scheduled - observed.num_first_sent)),
                0,
                "requests",
                "the load was not the profile's",
            ),
        ]
    if observed.readings:
        verdicts += _check_server(observed)
    return verdicts


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
            max(1.0, len(readings) / 10),
            "",
            "its part of the report has holes",
        ),
    ]
