"""A result as lines for a terminal: the verdict first, then the figures, then what was checked."""

from __future__ import annotations

from deepseek_triton.loadtest.measure import Backlog, Distribution, counted, percentile
from deepseek_triton.loadtest.result import LoadTestResult
from deepseek_triton.loadtest.verdict import amount

COLUMNS = ("", "median", "90th", "99th", "longest")


def table(result: LoadTestResult) -> str:
    """The whole text."""
    summary = result.summary
    rows = [
        ("latency", summary.latency_s),
        ("time to first token", summary.first_token_s),
        ("inter-token latency", summary.inter_token_s),
        ("longest gap in a stream", summary.max_gap_s),
    ]
    lines = [
        "",
        headline(result),
        f"{result.profile.name}: {summary.num_complete} of {summary.num_requests} requests complete, "
        f"{amount(summary.requests_per_s)} requests/s, {amount(summary.output_tokens_per_s)} tokens/s, "
        f"{backlog_sentence(summary.backlog)}",
        drift_sentence(result),
        "",
        "{:26}{:>12}{:>12}{:>12}{:>12}".format(*COLUMNS),
        *(_row(name, spread) for name, spread in rows),
        "",
    ]
    for title, verdicts in (("service level", result.levels), ("run check", result.checks)):
        lines += [f"{'met   ' if v.is_met else 'MISSED'} {title}: {v.sentence()}" for v in verdicts]
    lines += [f"{count} x {message}" for message, count in result.errors.items()]
    return "\n".join(lines)


def headline(result: LoadTestResult) -> str:
    """One sentence that a person can act on."""
    if not result.is_valid:
        wrong = [check for check in result.checks if not check.is_met]
        return f"INVALID: {wrong[0].sentence()}: {wrong[0].why}" + _and_more(len(wrong) - 1, "check")
    if result.missed:
        return f"MISSED: {result.missed[0].sentence()}" + _and_more(len(result.missed) - 1, "level")
    if not result.levels:
        return "DONE: the run is valid; the profile promises no service level"
    if len(result.levels) == 1:
        return f"MET: {result.levels[0].sentence()}; the run is valid"
    return f"MET: all {len(result.levels)} service levels hold, and the run is valid"


def backlog_sentence(backlog: Backlog) -> str:
    """How far the backlog grew and when it was gone."""
    if not backlog.peak:
        return "no backlog"
    return (
        f"backlog: {backlog.peak} at most, {amount(backlog.peak_s, 's')} into the run; "
        f"gone at {amount(backlog.gone_s, 's')}, it lasted {amount(backlog.lasted_s, 's')}"
    )


def drift_sentence(result: LoadTestResult) -> str:
    """What became of latency and memory in the course of the run: a leak or a creep shows here first."""
    quarter = result.profile.duration_s / 4
    complete = [sample for sample in counted(result.samples) if sample.is_complete]
    first, last = (
        percentile([s.latency_s for s in complete if low <= s.due_s < low + quarter], 50) for low in (0.0, 3 * quarter)
    )
    parts = [f"median latency {amount(first, 's')} to {amount(last, 's')}"]
    steps = zip(result.course.edges[1:], result.usage_course.server_mib, strict=True)
    memory = [mib for end, mib in steps if end > 0 and mib is not None]
    if memory:
        parts.append(f"the server's memory {amount(memory[0], 'MiB')} to {amount(memory[-1], 'MiB')}")
    return f"from the first quarter to the last: {', '.join(parts)}"


def _and_more(count: int, what: str) -> str:
    return f" (and {count} more {what}{'s' if count > 1 else ''})" if count else ""


def _row(name: str, spread: Distribution) -> str:
    values = (spread.p50, spread.p90, spread.p99, spread.max)
    return f"{name:26}" + "".join(f"{amount(value, 's'):>12}" for value in values)
