"""The alerts, each with series that make it fire and series that keep it quiet, from which its tests are written.

Each has a paragraph in docs/operations.md under its own name; a test checks that.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.metrics import GATEWAY_JOB, JOB
from deploy.recording import BY, LIMITS

RUNBOOK = "docs/operations.md"
AT = f'instance="a:8002", job="{JOB}"'
GATEWAY = f'instance="g:9000", job="{GATEWAY_JOB}"'
BACKEND = f'{GATEWAY}, backend="a:8001"'
MODEL = f'{AT}, model="m", version="1"'
Series = dict[str, str]  # a series → its values a minute, as promtool writes them: "0+6xALL" is 0, 6, 12, … to the end


@dataclass(frozen=True)
class Alert:
    """An alert. fires, quiet: series with which it does, and doesn't, after `at`.

    wait: how long the condition must hold. labels: of the alert that fires, severity aside.
    """

    name: str
    query: str
    wait: str
    severity: str
    summary: str
    fires: Series
    quiet: Series
    labels: dict[str, str]
    at: str = "20m"

    @property
    def runbook(self) -> str:
        """The paragraph about it."""
        return f"{RUNBOOK}#{self.name.lower()}"


def _limit(name: str) -> str:
    return f"on () group_left () {LIMITS[name].recorded}"


def _counter(name: str, per_step: float, labels: str = MODEL) -> Series:
    return {f"deepseek_{name}{{{labels}}}": f"0+{per_step:g}xALL"}


def _gauge(name: str, value: float, labels: str = MODEL) -> Series:
    return {f"{name}{{{labels}}}": f"{value:g}xALL"}


def _latency(metric: str, within: str, counts: tuple[float, float]) -> Series:
    """A histogram of which, each step, so many observations are within the bound and so many in all."""
    bucket = f"deepseek_{metric}_seconds_bucket{{{MODEL}, le="
    return {f'{bucket}"{within}"}}': f"0+{counts[0]:g}xALL", f'{bucket}"10"}}': f"0+{counts[1]:g}xALL",
            f'{bucket}"+Inf"}}': f"0+{counts[1]:g}xALL"}  # fmt: skip


def _requests(failed: float, total: float) -> Series:
    return {
        **_counter("requests_total", total), **_counter("requests_failed_total", failed),
        **_counter("requests_expired_total", 0), **_counter("requests_refused_total", 0),
    }  # fmt: skip


def _answers(errors: float, good: float) -> Series:
    """The gateway's answers each minute."""
    name = f'gateway_requests_total{{{GATEWAY}, route="/v1/completions", model="m", status='
    return {f'{name}"503"}}': f"0+{errors:g}xALL", f'{name}"200"}}': f"0+{good:g}xALL"}


def _pages(blocks: int, free: int, waiting: int) -> Series:
    """A cache in pages, and the sequences that wait."""
    return {
        **_gauge("deepseek_cache_blocks", blocks), **_gauge("deepseek_cache_blocks_free", free),
        **_gauge("deepseek_sequences_waiting", waiting),
    }  # fmt: skip


def _key_expiry(days: float) -> Series:
    """The next key of the gateway expires so many days after the series' begin; promtool's clock begins at 0."""
    return _gauge("gateway_key_expiry_timestamp_seconds", days * 86400, GATEWAY)


def _drift(psi: float, records: float) -> Series:
    """An application's drift: one input's PSI, beside another's that is small, of so many records."""
    name = f'deepseek_drift_psi{{{AT}, model="m", input='
    return {
        f'{name}"text"}}': f"{psi:g}xALL", f'{name}"night"}}': "0.01xALL",
        **_gauge("deepseek_drift_window_records", records, f'{AT}, model="m"'),
    }  # fmt: skip


_OF_MODEL = {"instance": "a:8002", "model": "m"}


def _burn(long: str, short: str, rate: float) -> str:
    """Two windows: the long one says that it matters, the short one that it hasn't ended."""
    over = f"(deepseek:error_ratio:rate{{}} / {_limit('error_budget')} > {rate:g})"
    return f"{over.format(long)} and {over.format(short)}"


ALERTS = (
    Alert(
        "DeepSeekServerDown", f'up{{job="{JOB}"}} == 0', "1m", "page", "{{ $labels.instance }} doesn't answer.",
        _gauge("up", 0, AT), _gauge("up", 1, AT), {"instance": "a:8002", "job": JOB},
    ),
    Alert(
        "DeepSeekMetricsMissing", f'up{{job="{JOB}"}} == 1 unless on (instance) deepseek_slots', "10m", "ticket",
        "{{ $labels.instance }} answers, but no engine has loaded there.",
        _gauge("up", 1, AT), {**_gauge("up", 1, AT), **_gauge("deepseek_slots", 8)},
        {"instance": "a:8002", "job": JOB},
    ),
    Alert(
        "DeepSeekEngineStalled",
        f"sum by ({BY}) (deepseek_slots_used) > 0 and sum by ({BY}) (rate(deepseek_generated_tokens_total[2m])) == 0 "
        f"and sum by ({BY}) (rate(deepseek_prompt_tokens_total[2m])) == 0",
        "2m", "page", "{{ $labels.model }} has sequences that run, and computes no token.",
        {**_gauge("deepseek_slots_used", 3), **_counter("generated_tokens_total", 0),
         **_counter("prompt_tokens_total", 0)},
        {**_gauge("deepseek_slots_used", 3), **_counter("generated_tokens_total", 90),
         **_counter("prompt_tokens_total", 0)},
        _OF_MODEL,
    ),
    Alert(
        "DeepSeekRestarts", f"sum by ({BY}) (resets(deepseek_responses_total[30m])) > 2", "0m", "page",
        "{{ $labels.model }} has been started again {{ $value }} times within half an hour.",
        {f"deepseek_responses_total{{{MODEL}}}": "5 9 1 4 2 8 1 9 3 7x40"},
        {f"deepseek_responses_total{{{MODEL}}}": "5 9 1 4 5 8 9 9 9 10x40"}, _OF_MODEL,
    ),
    Alert(
        "DeepSeekSlowFirstToken", f"deepseek:first_token_seconds:p99 > {_limit('first_token_p99_seconds')}",
        "5m", "page", "1 in 100 first tokens of {{ $labels.model }} takes over {{ $value | humanizeDuration }}.",
        _latency("time_to_first_token", "0.5", (30, 60)), _latency("time_to_first_token", "0.5", (60, 60)), _OF_MODEL,
    ),
    Alert(
        "DeepSeekSlowTokens", f"deepseek:inter_token_seconds:p99 > {_limit('inter_token_p99_seconds')}",
        "10m", "ticket", "One in a hundred tokens of {{ $labels.model }} takes over {{ $value | humanizeDuration }}.",
        _latency("inter_token_latency", "0.1", (30, 60)), _latency("inter_token_latency", "0.1", (60, 60)), _OF_MODEL,
    ),
    Alert(
        "DeepSeekQueueTime", f"deepseek:queue_seconds:p99 > {_limit('queue_p99_seconds')}",
        "5m", "ticket", "One in a hundred requests of {{ $labels.model }} waits over {{ $value | humanizeDuration }}.",
        _latency("queue_time", "1", (30, 60)), _latency("queue_time", "1", (60, 60)), _OF_MODEL,
    ),
    Alert(
        "DeepSeekBacklog", f"sum by ({BY}) (deepseek_sequences_waiting) > {_limit('backlog')}", "5m", "page",
        "{{ $value }} sequences of {{ $labels.model }} wait for a slot.",
        _gauge("deepseek_sequences_waiting", 11), _gauge("deepseek_sequences_waiting", 10), _OF_MODEL,
    ),
    Alert(
        "DeepSeekCacheExhausted",
        f"deepseek:slots_used:ratio >= 1 and sum by ({BY}) (deepseek_sequences_waiting) > 0", "10m", "ticket",
        "Every slot of {{ $labels.model }}'s cache is in use, and sequences wait.",
        {**_gauge("deepseek_slots", 8), **_gauge("deepseek_slots_used", 8), **_gauge("deepseek_sequences_waiting", 1)},
        {**_gauge("deepseek_slots", 8), **_gauge("deepseek_slots_used", 8), **_gauge("deepseek_sequences_waiting", 0)},
        _OF_MODEL,
    ),
    Alert(
        "DeepSeekPagesExhausted",
        f"deepseek:cache_blocks_used:ratio >= 0.95 and sum by ({BY}) (deepseek_sequences_waiting) > 0", "10m", "ticket",
        "{{ $value | humanizePercentage }} of the cache of {{ $labels.model }} is in use, and sequences wait.",
        _pages(1000, 20, 1), _pages(1000, 60, 1), _OF_MODEL,
    ),
    Alert(
        "DeepSeekRefusals", f"sum by ({BY}) (rate(deepseek_requests_refused_total[5m])) > 0", "5m", "page",
        "{{ $labels.model }} refuses requests: its queue is full.",
        _counter("requests_refused_total", 1), _counter("requests_refused_total", 0), _OF_MODEL,
    ),
    Alert(
        "DeepSeekGpuIdle",
        f"avg by (instance) (nv_gpu_utilization) < {_limit('gpu_utilization')} "
        "and on (instance) sum by (instance) (deepseek_sequences_waiting) > 0",
        "10m", "ticket", "The GPUs of {{ $labels.instance }} work {{ $value | humanizePercentage }} of the time.",
        {**_gauge("nv_gpu_utilization", 0.5, f'{AT}, gpu_uuid="g"'), **_gauge("deepseek_sequences_waiting", 4)},
        {**_gauge("nv_gpu_utilization", 0.5, f'{AT}, gpu_uuid="g"'), **_gauge("deepseek_sequences_waiting", 0)},
        {"instance": "a:8002"},
    ),
    Alert(
        "DeepSeekHostMemory", "nv_cpu_memory_used_bytes / nv_cpu_memory_total_bytes > 0.95", "10m", "ticket",
        "{{ $labels.instance }} has used {{ $value | humanizePercentage }} of its memory.",
        {**_gauge("nv_cpu_memory_used_bytes", 97, AT), **_gauge("nv_cpu_memory_total_bytes", 100, AT)},
        {**_gauge("nv_cpu_memory_used_bytes", 90, AT), **_gauge("nv_cpu_memory_total_bytes", 100, AT)},
        {"instance": "a:8002", "job": JOB},
    ),
    Alert(
        "DeepSeekGatewayDown", f'up{{job="{GATEWAY_JOB}"}} == 0', "1m", "page",
        "The gateway {{ $labels.instance }} doesn't answer.",
        _gauge("up", 0, GATEWAY), _gauge("up", 1, GATEWAY), {"instance": "g:9000", "job": GATEWAY_JOB},
    ),
    Alert(
        "DeepSeekBackendDown", "min by (instance, backend) (gateway_backend_up) == 0", "1m", "page",
        "The server {{ $labels.backend }} doesn't answer the gateway {{ $labels.instance }}.",
        _gauge("gateway_backend_up", 0, BACKEND), _gauge("gateway_backend_up", 1, BACKEND),
        {"instance": "g:9000", "backend": "a:8001"},
    ),
    Alert(
        "DeepSeekBreakerOpen", "max by (instance, backend, model) (gateway_breaker_open) > 0", "1m", "page",
        "The breaker of {{ $labels.model }} at {{ $labels.backend }} is open: the server fails its requests.",
        _gauge("gateway_breaker_open", 1, f'{BACKEND}, model="m"'),
        _gauge("gateway_breaker_open", 0, f'{BACKEND}, model="m"'),
        {"instance": "g:9000", "backend": "a:8001", "model": "m"},
    ),
    Alert(
        "DeepSeekGatewayErrors", f"deepseek:gateway_errors:ratio_rate5m > {_limit('gateway_errors')}", "5m", "page",
        "{{ $value | humanizePercentage }} of the answers of {{ $labels.instance }} are errors of the server.",
        _answers(2, 98), _answers(0.5, 98), {"instance": "g:9000"},
    ),
    Alert(
        "DeepSeekKeyExpiry",
        f"min by (instance) (gateway_key_expiry_timestamp_seconds) - time() < {_limit('key_expiry_seconds')}",
        "5m", "ticket", "An API key of {{ $labels.instance }} expires in {{ $value | humanizeDuration }}.",
        _key_expiry(7), _key_expiry(8), {"instance": "g:9000"},
    ),
    Alert(
        "DeepSeekInputDrift",
        f"max by ({BY}, input) (deepseek_drift_psi) > {_limit('drift_psi')} and on ({BY}) "
        f"max by ({BY}) (deepseek_drift_window_records) >= {_limit('drift_records')}",
        "30m", "ticket", "{{ $labels.input }} of {{ $labels.model }} has drifted: PSI {{ $value | humanize }}.",
        _drift(0.4, 800), _drift(0.4, 100), {**_OF_MODEL, "input": "text"}, "50m",
    ),
    # Google's workbook of site reliability, chapter 5: 2 % of thirty days' budget within an hour, 5 % within six.
    Alert(
        "DeepSeekErrorBudgetFast", _burn("1h", "5m", 14.4), "2m", "page",
        "{{ $labels.model }} uses up a month's error budget within two days.",
        _requests(6, 60), _requests(0.06, 60), _OF_MODEL, "70m",
    ),
    Alert(
        "DeepSeekErrorBudgetSlow", _burn("6h", "30m", 6), "15m", "ticket",
        "{{ $labels.model }} uses up a month's error budget within five days.",
        _requests(0.6, 60), _requests(0.06, 60), _OF_MODEL, "390m",
    ),
)  # fmt: skip
