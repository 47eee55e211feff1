"""Checks a run's summary against the service levels of its profile."""

from __future__ import annotations

from collections.abc import Callable

from deepseek_triton.loadtest.measure import Summary
from deepseek_triton.loadtest.profile import Levels
from deepseek_triton.loadtest.verdict import Verdict

# Field of Levels → name, unit, value from the summary, explanation.
LEVELS: dict[str, tuple[str, str, Callable[[Summary], float | None], str]] = {
    "p99_latency_s": (
        "latency, 99th percentile",
        "s",
        lambda summary: summary.latency_s.p99,
        "one request in a hundred takes longer, from due to its last token",
    ),
    "p99_first_token_s": (
        "time to first token, 99th percentile",
        "s",
        lambda summary: summary.first_token_s.p99,
        "one stream in a hundred begins later",
    ),
    "p99_inter_token_s": (
        "inter-token latency, 99th percentile",
        "s",
        lambda summary: summary.inter_token_s.p99,
        "one stream in a hundred is slower, on its own average",
    ),
    "max_error_ratio": (
        "requests without a complete answer",
        "%",
        lambda summary: summary.error_ratio * 100,
        "errors, timeouts and answers that broke off",
    ),
    "max_backlog": (
        "backlog, at its longest",
        "requests",
        lambda summary: float(summary.backlog.peak),
        "requests due whose answer had not begun",
    ),
    "max_backlog_s": (
        "backlog, from its begin to its end",
        "s",
        lambda summary: summary.backlog.lasted_s,
        "so long somebody waited without a pause, around the backlog's peak",
    ),
}


def check(levels: Levels, summary: Summary) -> list[Verdict]:
    """Return one verdict for each level that the profile has."""
    verdicts = []
    for field, (name, unit, figure, why) in LEVELS.items():
        limit = getattr(levels, field)
        if limit is not None:
            verdicts.append(Verdict(name, figure(summary), limit * 100 if unit == "%" else limit, unit, why))
    return verdicts
