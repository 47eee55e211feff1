"""Reports of a tuning run: tables for a terminal, and a plot of throughput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_triton.builders.tune.confirm import ConfidenceInterval, Confirmed, Decision
from deepseek_triton.builders.tune.measurement import Measured
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.builders.tune.search import is_within
from deepseek_triton.builders.tune.space import Point
from deepseek_triton.loadtest.intervals import CONFIDENCE, Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def search_table(measured: Sequence[Measured], start: Point, p99_limit_ms: float) -> str:
    """Return a table of the search's points, the fastest first; > marks the start, - a point over the limit."""
    names = list(start)
    lines = [f"  {_header(names)}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}"]
    for one in sorted(measured, key=lambda one: -one.result.throughput):
        result = one.result
        mark = ">" if one.point == start else " "
        mark += " " if is_within(result, p99_limit_ms) else "-"
        numbers = f"{result.throughput:12.2f}{result.p50_ms:10.1f}{result.p99_ms:10.1f}"
        lines.append(f"{mark}{_values(names, one.point)}{f'  {result.failure}' if result.failure else numbers}")
    return "\n".join(lines)


def decision_table(decision: Decision, num_rounds: int) -> str:
    """Return a table of the configurations measured in rounds; * marks the winner, > the start."""
    names = list(decision.confirmed[0].point)
    lines = [
        f"{num_rounds} rounds together, {CONFIDENCE:.0%} intervals (over the start: for all candidates at once)",
        f"  {_header(names)}{'requests/s':>26}{'p99 ms':>26}{'over the start':>28}",
    ]
    for one, verdict in zip(decision.confirmed, decision.verdicts, strict=True):
        mark = "*" if one is decision.winner else ">" if one is decision.confirmed[0] else " "
        numbers = ""
        if not one.failure:
            numbers = f"{_interval(one.requests_per_s, 1, 2)}{_interval(one.p99_s, 1e3, 0)}{_gain(one.gain)}"
        lines.append(f"{mark} {_values(names, one.point)}{numbers}  {verdict}")
    return "\n".join(lines)


def plot(
    measured: Sequence[Measured],
    start: Point,
    decision: Decision | None,
    p99_limit_ms: float,
    title: str,
    path: Path,
) -> None:
    """Write a PNG plot of throughput against the 99th percentile of the latency, with intervals where confirmed.

    Raises:
        TuneError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    shown = [one for one in measured if not one.result.failure]
    for is_in, colour, label in ((True, "C0", "measured once, within the limit"), (False, "0.6", "once, too slow")):
        part = [one.result for one in shown if is_within(one.result, p99_limit_ms) == is_in]
        if part:
            axes.scatter([r.p99_ms for r in part], [r.throughput for r in part], color=colour, s=22, label=label)
    for i, confirmed in enumerate(decision.confirmed if decision else []):
        _mark(axes, confirmed, i, is_winner=decision is not None and confirmed is decision.winner)
    if decision is None:
        for one in (one for one in shown if one.point == start):
            axes.scatter(one.result.p99_ms, one.result.throughput, marker="D", s=60, color="C1", label="start")
    axes.axvline(p99_limit_ms, color="C3", linestyle="--", label=f"limit {p99_limit_ms:g} ms")
    axes.set(xlabel="99th percentile of a request's latency (ms)", ylabel="requests/s", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror}") from error


def _mark(axes: Axes, one: Confirmed, number: int, *, is_winner: bool) -> None:
    if one.requests_per_s is None or one.p99_s is None:
        return
    x, y = one.p99_s, one.requests_per_s
    role = "start" if not number else f"candidate {number}"
    values = "\n".join(f"  {name} {value}" for name, value in one.point.items())
    axes.errorbar(
        x.value * 1e3,
        y.value,
        xerr=[[(x.value - x.low) * 1e3], [(x.high - x.value) * 1e3]],
        yerr=[[y.value - y.low], [y.high - y.value]],
        fmt="*" if is_winner else "D",
        markersize=15 if is_winner else 7,
        color=f"C{(1, 2, 4, 5, 6)[number % 5]}",
        capsize=4,
        label=f"{role}{', the winner' if is_winner else ''}\n{values}",
        zorder=3,
    )


def _header(names: Sequence[str]) -> str:
    return "".join(f"{name:>{len(name) + 2}}" for name in names)


def _values(names: Sequence[str], point: Point) -> str:
    return "".join(f"{point[name]:>{len(name) + 2}}" for name in names)


def _interval(figure: ConfidenceInterval | None, factor: float, digits: int) -> str:
    if figure is None:
        return f"{'':26}"
    value, low, high = (f"{each * factor:.{digits}f}" for each in (figure.value, figure.low, figure.high))
    return f"{f'{value} [{low} to {high}]':>26}"


def _gain(gain: Difference | None) -> str:
    if gain is None or gain.change is None or gain.low is None or gain.high is None or not gain.a:
        return f"{'':28}"
    value, low, high = (f"{each / gain.a:+.1%}" for each in (gain.change, gain.low, gain.high))
    return f"{f'{value} [{low} to {high}]':>28}"
