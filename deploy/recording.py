"""Recording rules: ratios and quantiles that alerts and dashboards share, and the limits that may be set.

A limit is a recorded number: who wants another one changes it in one place, `python -m deploy.generate --limit` or the
chart's `monitoring.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOWS = ("5m", "30m", "1h", "6h")
BY = "instance, model"
# A client that stops or leaves is no fault of the service: cancelled requests aren't counted.
FAULTS = ("requests_failed_total", "requests_expired_total", "requests_refused_total")


@dataclass(frozen=True)
class Limit:
    """A number that may be set: its recorded name is `deepseek:limit:NAME`."""

    name: str
    value: float
    meaning: str

    @property
    def recorded(self) -> str:
        """As a query writes it."""
        return f"deepseek:limit:{self.name}"


LIMITS = {
    limit.name: limit
    for limit in (
        Limit("first_token_p99_seconds", 0.5, "99 of 100 first tokens must come within it"),
        Limit("inter_token_p99_seconds", 0.1, "99 of 100 tokens must follow the one before within it"),
        Limit("queue_p99_seconds", 1.0, "99 of 100 requests must have a slot within it"),
        Limit("backlog", 10, "sequences of a model that may wait"),
        Limit("gpu_utilization", 0.7, "the least share of time in which a GPU should work while requests wait"),
        Limit("gateway_errors", 0.01, "the share of the gateway's answers that may have a status from 500 on"),
        Limit("drift_psi", 0.25, "the population stability index from which an input or a score has drifted"),
        Limit("drift_records", 500, "the records without which drift isn't judged"),
        Limit("key_expiry_seconds", 7 * 86400, "an API key that expires within it is told of"),
        Limit("error_budget", 0.001, "the share of requests that may fail in thirty days"),
    )
}


def _ratio(window: str) -> str:
    faults = " + ".join(f"rate(deepseek_{name}[{window}])" for name in FAULTS)
    # A refused request was never accepted, so that requests_total lacks it.
    all_requests = f"rate(deepseek_requests_total[{window}]) + rate(deepseek_requests_refused_total[{window}])"
    return f"sum by ({BY}) ({faults}) / (sum by ({BY}) ({all_requests}) > 0)"


def _quantile(metric: str, quantile: float) -> str:
    return f"histogram_quantile({quantile}, sum by ({BY}, le) (rate(deepseek_{metric}_seconds_bucket[5m])))"


QUANTILES = {"first_token": "time_to_first_token", "inter_token": "inter_token_latency", "queue": "queue_time"}
RULES: dict[str, str] = {
    **{f"deepseek:error_ratio:rate{window}": _ratio(window) for window in WINDOWS},
    **{
        f"deepseek:{short}_seconds:p{round(quantile * 100)}": _quantile(metric, quantile)
        for short, metric in QUANTILES.items()
        for quantile in (0.5, 0.99)
    },
    # Without an error yet there is no series of one: the share is 0, not unknown.
    "deepseek:gateway_errors:ratio_rate5m": (
        '(sum by (instance) (rate(gateway_requests_total{status=~"5.."}[5m])) or '
        "sum by (instance) (rate(gateway_requests_total[5m])) * 0) / "
        "(sum by (instance) (rate(gateway_requests_total[5m])) > 0)"
    ),
    "deepseek:generated_tokens:rate5m": f"sum by ({BY}) (rate(deepseek_generated_tokens_total[5m]))",
    "deepseek:slots_used:ratio": f"sum by ({BY}) (deepseek_slots_used) / sum by ({BY}) (deepseek_slots)",
    # 0 where the cache has slots
    "deepseek:cache_blocks_used:ratio": (
        f"(sum by ({BY}) (deepseek_cache_blocks) - sum by ({BY}) (deepseek_cache_blocks_free)) / "
        f"clamp_min(sum by ({BY}) (deepseek_cache_blocks), 1)"
    ),
    "deepseek:prefix_hit:ratio_rate5m": (
        f"sum by ({BY}) (rate(deepseek_prefix_hit_tokens_total[5m])) / "
        f"(sum by ({BY}) (rate(deepseek_prompt_tokens_total[5m])) > 0)"
    ),
}
