"""The report: a result in, one HTML file out, which needs nothing else: no server, no network, no script library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from loadtest.measure import Distribution, Summary
from loadtest.metrics import PENDING
from loadtest.report.chart import Bars, Chart, Series
from loadtest.report.text import headline
from loadtest.result import Result
from loadtest.verdict import amount

DIRECTORY = Path(__file__).parent
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
# A 99th percentile of fewer requests than this is one of the slowest few.
MANY_REQUESTS = 100


def write_report(result: Result, path: Path) -> None:
    """Write the page."""
    path.write_text(render(result), encoding="utf-8")


def render(result: Result) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["amount"] = _amount
    charts = [chart for chart in _charts(result) if not chart.is_empty]
    return environment.get_template("page.html.jinja").render(
        result=result,
        headline=headline(result),
        state="invalid" if not result.is_valid else "missed" if result.missed else "met",
        style=Markup((DIRECTORY / "style.css").read_text(encoding="utf-8")),
        script=Markup((DIRECTORY / "hover.js").read_text(encoding="utf-8")),
        tiles=_tiles(result.summary),
        rows=_rows(result.summary),
        charts=[(chart, Markup(chart.svg())) for chart in charts],
        bars=Markup(_bars(result).svg()) if result.server else None,
        unseen_ms=_unseen_ms(result),
        few=result.summary.num_requests < MANY_REQUESTS,
        profile_json=json.dumps(dataclasses.asdict(result.profile), indent=2),
        machine_json=json.dumps(result.machine, indent=2),
    )


def _amount(value: float | None, unit: str = "") -> str:
    """A number that keeps its unit beside it, whatever the width."""
    return amount(value, unit).replace(" ", "\u00a0")


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The figures that are looked at first: name, value, what stands below it."""
    failed = summary.num_errors + summary.num_incomplete
    return [
        ("time to first token, median", _amount(summary.first_token_s.p50, "s"), _p99(summary.first_token_s)),
        ("latency, median", _amount(summary.latency_s.p50, "s"), _p99(summary.latency_s)),
        ("inter-token latency, median", _amount(summary.inter_token_s.p50, "s"), _p99(summary.inter_token_s)),
        ("output tokens/s", _amount(summary.output_tokens_per_s), f"{_amount(summary.requests_per_s)} requests/s"),
        ("complete answers", f"{summary.num_complete} of {summary.num_requests}", f"{failed} failed or broken off"),
        ("longest backlog", _amount(summary.max_backlog), "requests due, not begun"),
    ]


def _p99(spread: Distribution) -> str:
    return f"99th percentile {_amount(spread.p99, 's')}"


def _rows(summary: Summary) -> list[tuple[str, Distribution, str]]:
    """The spreads of the whole run: name, values, unit."""
    return [
        ("latency", summary.latency_s, "s"),
        ("time to first token", summary.first_token_s, "s"),
        ("inter-token latency", summary.inter_token_s, "s"),
        ("longest gap in a stream", summary.max_gap_s, "s"),
        ("speed of a stream", summary.stream_tokens_per_s, "tokens/s"),
        ("prompt", summary.input_tokens, "tokens"),
        ("answer", summary.output_tokens, "tokens"),
    ]


Line = tuple[str, Sequence[float | None]]


def _charts(result: Result) -> list[Chart]:
    course, levels = result.course, result.profile.levels

    def chart(title: str, unit: str, lines: Sequence[Line], limit: float | None = None, note: str = "") -> Chart:
        series = [Series(name, values, COLOURS[i % len(COLOURS)]) for i, (name, values) in enumerate(lines)]
        return Chart(title, unit, course.edges, series, limit, note)

    latency: list[Line] = [
        ("median", course.latency_p50_s),
        ("90th", course.latency_p90_s),
        ("99th", course.latency_p99_s),
    ]
    first_token: list[Line] = [("median", course.first_token_p50_s), ("99th", course.first_token_p99_s)]
    inter_token: list[Line] = [("median", [v and v * 1e3 for v in course.inter_token_p50_s])]
    requests: list[Line] = [("due", course.due_per_s), ("complete", course.complete_per_s)]
    if any(course.failed_per_s):
        requests.append(("failed", course.failed_per_s))
    at_once: list[Line] = [("being answered", course.answering), ("waiting to begin", course.waiting)]
    gauges = sorted({name for figures in result.server_course.values() for name in figures} - set(_TRITONS))
    return [
        chart("Latency", "s", latency, levels.p99_latency_s, "by the moment that a request was due"),
        chart("Time to first token", "s", first_token, levels.p99_first_token_s, "streams, by when they were due"),
        chart("Inter-token latency", "ms", inter_token, note="time after the first response, divided by tokens"),
        chart("Requests", "requests/s", requests, note="when they were due, and when their answer was complete"),
        chart("Output", "tokens/s", [("tokens", course.tokens_per_s)], note="when they came"),
        chart(
            "At once",
            "requests",
            at_once,
            levels.max_backlog,
            "on average; those being answered are the batch that an engine forms in flight",
        ),
        chart(
            "Executed batch size",
            "requests",
            _server_lines(result, "batch_size"),
            note="by Triton's own batcher; an engine's in-flight batch is under «At once»",
        ),
        chart("Queue time", "ms a request", _server_lines(result, "queue_ms"), note="in Triton, by model"),
        chart(
            "Compute time",
            "ms a request",
            _server_lines(result, "compute_ms"),
            note="input, inference and output, by model",
        ),
        *(chart(name, "", _server_lines(result, name), note="a gauge of the model's own") for name in gauges),
    ]


_TRITONS = ("batch_size", "queue_ms", "compute_ms", PENDING)


def _server_lines(result: Result, figure: str) -> list[Line]:
    """The models that have a figure; the ensemble's own are its parts' sums, and would hide them."""
    lines = [(model, figures[figure]) for model, figures in sorted(result.server_course.items()) if figure in figures]
    parts = [(model, values) for model, values in lines if model != result.target.model]
    return [(_short(model, result), values) for model, values in parts or lines]


def _short(model: str, result: Result) -> str:
    return model.removeprefix(f"{result.target.model}-")


def _bars(result: Result) -> Bars:
    parts = {model: work for model, work in result.server.items() if model != result.target.model}
    rows = [
        (f"{_short(model, result)} ({work.requests:,.0f} requests)", (work.queue_ms or 0.0, work.compute_ms or 0.0))
        for model, work in sorted((parts or result.server).items())
    ]
    return Bars("ms", rows, (("queue", "c2"), ("compute", "c1")))


def _unseen_ms(result: Result) -> float | None:
    """What a request of a decoupled ensemble spends outside its parts' queue and compute times, in its engine's loop.

    Each part's time is taken as often as it runs for one request. Parts overlap with the loop: it is an estimate.
    """
    whole = result.server.get(result.target.model)
    if whole is None or whole.request_ms is None or len(result.server) < 2 or not whole.requests:
        return None
    inside = sum(
        ((work.queue_ms or 0.0) + (work.compute_ms or 0.0)) * work.requests / whole.requests
        for model, work in result.server.items()
        if model != result.target.model
    )
    return max(whole.request_ms - inside, 0.0)
