"""Whether a run may be believed: what was seen of the generator itself in, verdicts out.

A load generator that is itself too slow measures itself, and a report that loses requests flatters the server. A run
that fails one of these checks is invalid whatever its figures are, and says so.

One rule gives the limits of time: what isn't the server's may be a tenth of a figure at most (TOLERANCE). So a limit
is as strict as what was measured needs it to be: 10 ms of the generator's own are nothing beside an answer of 10 s, and
would be a lie about one of 20 ms. Counts have no tolerance: a request is sent, answered and counted once, or it isn't.
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

TOLERANCE = 0.1  # of a figure: what may be in it that isn't the server's
# The generator is one thread. One that is busy a share r of the time keeps what comes waiting, on average, for
# r / (1 - r) times as long as it needs for it itself: as long again at a half, nine times as long at 90 %.
MAX_GENERATOR_SHARE = 0.5
GENERATOR_STRETCH_S = 5.0  # its busiest: shorter bursts are seen as lag


@dataclass(frozen=True)
class Observed:
    """What was seen during a run."""

    samples: Sequence[Sample]  # all, the warm-up's too
    tokens: Mapping[int, int]  # whole second → tokens that came in it
    num_scheduled: int | None  # first requests that should have been sent; None: closed users send when they can
    num_first_sent: int  # first requests of conversations that were sent
    num_begun: int  # requests that were begun
    num_bugs: int  # exceptions that are no client's error
    lags_s: Sequence[float]  # by how much the event loop woke late, once each tenth of a second
    usage: Sequence[Usage]  # of this machine's processors
    cores: int  # of this machine
    is_server_here: bool  # on this machine
    may_be_shared: bool  # others' work on this machine is recorded, and not held against the run
    readings: Sequence[Reading]  # of the server's counters; none: they couldn't be had
    num_missed_readings: int
    model: str


def check(observed: Observed) -> list[Verdict]:
    """Every check that can be made of a run."""
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
    # The usual lag is in every figure, the rare ones are in the tails.
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
    """The shortest figure that is measured from when a request was due; 0 if nothing was answered.

    That is the time to first token; without streams, the latency.
    """
    complete = [sample for sample in counted(samples) if sample.is_complete]
    streams = [wait for sample in complete if (wait := sample.first_token_s) is not None]
    return percentile(streams or [sample.latency_s for sample in complete], rank) or 0.0


def _check_machine(observed: Observed) -> list[Verdict]:
    """What others take slows server and generator by that share, to the least."""
    if len(observed.usage) < 2:
        return []
    first, last = observed.usage[0], observed.usage[-1]
    part = usage.shares(first, last, observed.cores, is_server_here=observed.is_server_here)
    if part is None or part.others is None:
        return []  # the server is here, but not ours to see: what is its own and what is others' can't be told apart
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
