"""What tuning found: a table for a terminal, a plot of throughput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builders.tune.search import Measured, is_within
from builders.tune.space import TuneError


def table(measured: Sequence[Measured], best: Measured | None, p99_limit_ms: float) -> str:
    """A line for each point, the fastest first; * marks the winner, - what misses the limit."""
    names = list(measured[0].point) if measured else []
    lines = ["  " + "".join(f"{name:>21}" for name in names) + f"{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}"]
    for one in sorted(measured, key=lambda one: -one.result.throughput):
        mark = "*" if best is not None and one.point == best.point else " "
        mark = mark if is_within(one.result, p99_limit_ms) else "-"
        values = "".join(f"{one.point[name]:>21}" for name in names)
        result = one.result
        told = result.failure or f"{result.throughput:10.2f}{result.p50_ms:10.1f}{result.p99_ms:10.1f}"
        lines.append(f"{mark} {values}  {told}")
    return "\n".join(lines)


def plot(measured: Sequence[Measured], best: Measured | None, p99_limit_ms: float, title: str, path: Path) -> None:
    """Throughput against 99th-percentile latency, a dot for each point, as PNG.

    Raises:
        TuneError: it can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shown = [one for one in measured if not one.result.failure]
    for is_in, colour, label in ((True, "C0", "within the limit"), (False, "0.6", "too slow")):
        part = [one for one in shown if is_within(one.result, p99_limit_ms) == is_in]
        if part:
            axes.scatter(
                [one.result.p99_ms for one in part], [one.result.throughput for one in part], color=colour, label=label
            )
    if best is not None:
        where = (best.result.p99_ms, best.result.throughput)
        axes.scatter(*where, marker="*", s=240, color="C1", label="best", zorder=3)
        told = "\n".join(f"{name} {value}" for name, value in best.point.items())
        axes.annotate(told, where, xytext=(10, -10), textcoords="offset points", fontsize="small", va="top")
    axes.axvline(p99_limit_ms, color="C3", linestyle="--", label=f"limit {p99_limit_ms:g} ms")
    axes.set(xlabel="99th percentile of a request's latency (ms)", ylabel="requests/s", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror}") from error
