"""Which charts a report has: a result in, charts out. How one is drawn is `chart.py`'s business.

Where client and engine know the same figure their lines share a chart, the engine's dashed.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_triton.loadtest.engine import is_engine
from deepseek_triton.loadtest.report.chart import Bars, Chart, Series
from deepseek_triton.loadtest.result import LoadTestResult

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")

Values = Sequence[float | None]
Line = tuple[str, Values]


def charts(result: LoadTestResult) -> list[Chart]:
    """Those that have something to show."""
    all_charts = [*_seen_by_clients(result), *_inside_triton(result), *_machine(result)]
    return [chart for chart in all_charts if not chart.is_empty]


def bars(result: LoadTestResult) -> Bars:
    """What a request waits for and is computed, in each part of the server."""
    engine = result.engine
    rows: list[tuple[str, tuple[float, ...]]] = []
    for model, work in sorted(result.server.items()):
        if is_computing(model, result):
            times = (work.queue_ms or 0.0, work.compute_ms or 0.0, 0.0, 0.0)
            rows.append((f"{short(model, result)} ({work.requests:,.0f} requests)", times))
    if engine is not None:
        times = (1e3 * (engine.queue_s or 0.0), 0.0, 1e3 * (engine.prefill_s or 0.0), 1e3 * (engine.decode_s or 0.0))
        rows.insert(0, (f"engine ({engine.first_token_s.count:,.0f} requests)", times))
    return Bars("ms", rows, (("queue", "c2"), ("compute", "c1"), ("prefill", "c4"), ("decode", "c5")))


def short(model: str, result: LoadTestResult) -> str:
    """A part's name without the ensemble's."""
    return model.removeprefix(f"{result.target.model}-")


def is_computing(model: str, result: LoadTestResult) -> bool:
    """Whether Triton's times are a model's work: an ensemble's are its parts' sums, a decoupled engine only queues."""
    if model == result.target.model:
        return len(result.server) == 1 and result.engine is None
    return result.engine is None or not is_engine(model, result.target.model)


def _seen_by_clients(result: LoadTestResult) -> list[Chart]:
    course, engine, levels = result.course, result.engine_course, result.profile.levels

    def chart(title: str, unit: str, lines: list[Series], limit: float | None = None, note: str = "") -> Chart:
        return Chart(title, unit, course.edges, lines, limit, note=note)

    latency = _lines(("median", course.latency_p50_s), ("90th", course.latency_p90_s), ("99th", course.latency_p99_s))
    first_token = _lines(("median", course.first_token_p50_s), ("99th", course.first_token_p99_s))
    inter_token = _lines(("median", _ms(course.inter_token_p50_s)), ("99th", _ms(course.inter_token_p99_s)))
    output = _lines(("received", course.tokens_per_s))
    running = _lines(("streams under way", course.answering))
    waiting = _lines(("requests due, not begun", course.waiting))
    requests = _lines(("due", course.due_per_s), ("complete", course.complete_per_s))
    if any(course.failed_per_s):
        requests.append(Series("failed", course.failed_per_s, "c3"))
    slots = None
    if engine is not None:
        first_token += _engines(
            ("engine's median", engine.first_token_p50_s), ("engine's 99th", engine.first_token_p99_s)
        )
        inter_token += _engines(
            ("engine's median", _ms(engine.inter_token_p50_s)), ("engine's 99th", _ms(engine.inter_token_p99_s))
        )
        output += _engines(("generated", engine.tokens_per_s))
        running += _engines(("engine's slots used", engine.slots_used))
        waiting += _engines(("engine's sequences without a slot", engine.waiting))
        slots = result.engine.slots if result.engine else None
    buckets = "; the engine's are estimates within its histogram's buckets" if engine else ""
    return [
        chart("Latency", "s", latency, levels.p99_latency_s, "by the moment that a request was due"),
        chart(
            "Time to first token",
            "s",
            first_token,
            levels.p99_first_token_s,
            f"streams, by when they were due{buckets}",
        ),
        chart(
            "Inter-token latency",
            "ms",
            inter_token,
            None if levels.p99_inter_token_s is None else 1e3 * levels.p99_inter_token_s,
            f"a stream's own average{'; the engine counts each token by itself' if engine else ''}",
        ),
        chart("Requests", "requests/s", requests, note="when they were due, and when their answer was complete"),
        chart("Output", "tokens/s", output, note="when they came"),
        Chart(
            "Batch size" if engine else "Streams under way",
            "sequences",
            course.edges,
            running,
            limit=slots,
            limit_name="slots",
            note="on average",
        ),
        chart("Waiting", "requests", waiting, levels.max_backlog, "on average; a request waits for its first token"),
    ]


def _inside_triton(result: LoadTestResult) -> list[Chart]:
    edges, engine = result.course.edges, result.engine_course

    def lines(figure: str) -> list[Series]:
        parts = [(model, figures) for model, figures in sorted(result.server_course.items())]
        return _lines(
            *((short(model, result), figures[figure]) for model, figures in parts if is_computing(model, result))
        )

    charts = []
    if engine is not None:
        spent = _lines(("queue", engine.queue_s), ("prefill", engine.prefill_s), ("decode", engine.decode_s))
        note = "means, by when each part ended: until its slot, its first token, its last"
        charts.append(Chart("A request's time in the engine", "s", edges, spent, note=note))
    return [
        *charts,
        Chart("Executed batch size", "requests", edges, lines("batch_size"), note="by Triton's own batcher"),
        Chart("Queue time", "ms a request", edges, lines("queue_ms"), note="in Triton, by model"),
        Chart("Compute time", "ms a request", edges, lines("compute_ms"), note="input, inference and output, by model"),
    ]


def _machine(result: LoadTestResult) -> list[Chart]:
    edges, usage = result.course.edges, result.usage_course
    processors = _lines(
        ("server", usage.server_percent),
        ("load generator", usage.generator_percent),
        ("other programs", usage.others_percent),
    )
    return [
        Chart("CPU of this machine", "%", edges, processors, note="of all its cores"),
        Chart("Memory of the server", "MiB", edges, _lines(("resident", usage.server_mib)), note="all its processes"),
    ]


def _lines(*lines: Line) -> list[Series]:
    return [Series(name, values, COLOURS[i % len(COLOURS)]) for i, (name, values) in enumerate(lines)]


def _engines(*lines: Line) -> list[Series]:
    return [Series(name, values, f"{COLOURS[3 + i]} dashed") for i, (name, values) in enumerate(lines)]


def _ms(values: Values) -> Values:
    return [None if value is None else 1e3 * value for value in values]
