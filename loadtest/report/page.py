"""The report: a result in, one HTML file out, which needs nothing else: no server, no network, no script library."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from deepseek_triton.loadtest.engine import EngineWork, Spread
from deepseek_triton.loadtest.measure import Distribution, Summary
from deepseek_triton.loadtest.report.charts import bars, charts
from deepseek_triton.loadtest.report.text import backlog_sentence, drift_sentence, headline
from deepseek_triton.loadtest.result import LoadTestResult
from deepseek_triton.loadtest.verdict import amount

DIRECTORY = Path(__file__).parent
# A 99th percentile of fewer requests than this is one of the slowest few.
MANY_REQUESTS = 100


def write_report(result: LoadTestResult, path: Path) -> None:
    """Write the page."""
    path.write_text(render(result), encoding="utf-8")


def render(result: LoadTestResult) -> str:
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
    environment.filters["bounds"] = _bounds
    inside = bars(result)
    return environment.get_template("page.html.jinja").render(
        result=result,
        headline=headline(result),
        state="invalid" if not result.is_valid else "missed" if result.missed else "met",
        style=Markup((DIRECTORY / "style.css").read_text(encoding="utf-8")),
        script=Markup((DIRECTORY / "hover.js").read_text(encoding="utf-8")),
        tiles=_tiles(result.summary),
        rows=_rows(result.summary),
        charts=[(chart, Markup(chart.svg())) for chart in charts(result)],
        bars=Markup(inside.svg()) if result.server else None,
        parts=inside.parts_shown,
        backlog=backlog_sentence(result.summary.backlog),
        drift=drift_sentence(result),
        agreement=_agreement(result.engine, result.summary) if result.engine else [],
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
        (
            "backlog, at its longest",
            f"{summary.backlog.peak} requests",
            f"lasted {_amount(summary.backlog.lasted_s, 's')}",
        ),
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


def _agreement(engine: EngineWork, summary: Summary) -> list[tuple[str, str, Distribution, Spread]]:
    """What client and engine both measured: name, what differs between them, the client's figures, the engine's."""
    return [
        ("time to first token", "engine: from a request's arrival there", summary.first_token_s, engine.first_token_s),
        ("inter-token latency", "client: each stream's own average", summary.inter_token_s, engine.inter_token_s),
    ]


def _bounds(bucket: tuple[float, float] | None) -> str:
    """Where a percentile of a histogram lies."""
    if bucket is None:
        return "no figure"
    low, high = bucket
    if math.isinf(high):
        return f"above {_amount(low, 's')}"
    return f"{_amount(low, 's')} to {_amount(high, 's')}"
