"""An engine's metrics, without Triton; `ensemble/models/metrics.py` publishes them. Times are in seconds."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields

LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
INTERVAL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass
class Histogram:
    """Counts of observations by upper bound, not cumulative; the last of `counts` is for values above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Add `times` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class EngineMetrics:
    """One engine's metrics. A field is published under its name with the prefix `deepseek_`."""

    time_to_first_token_seconds: Histogram = field(
        default_factory=lambda: Histogram(LATENCY_BOUNDS), metadata=_help("From a request's arrival to its first token")
    )
    inter_token_latency_seconds: Histogram = field(
        default_factory=lambda: Histogram(INTERVAL_BOUNDS), metadata=_help("Between two tokens of a sequence")
    )
    queue_time_seconds: Histogram = field(
        default_factory=lambda: Histogram(LATENCY_BOUNDS), metadata=_help("From a request's arrival to its slot")
    )
    requests_total: int = field(default=0, metadata=_help("Requests accepted"))
    requests_cancelled_total: int = field(default=0, metadata=_help("Requests whose client stopped or went away"))
    requests_failed_total: int = field(default=0, metadata=_help("Requests accepted that ended with an error"))
    requests_refused_total: int = field(default=0, metadata=_help("Requests refused because the queue was full"))
    requests_expired_total: int = field(default=0, metadata=_help("Requests that ran into a time limit"))
    prompt_tokens_total: int = field(default=0, metadata=_help("Tokens of prompts admitted"))
    prefix_hit_tokens_total: int = field(default=0, metadata=_help("Tokens of prompts found in a cache"))
    prefix_hits_total: int = field(default=0, metadata=_help("Prompts of which a part was found in a cache"))
    preemptions_total: int = field(default=0, metadata=_help("Sequences that gave up their memory and were resumed"))
    generated_tokens_total: int = field(default=0, metadata=_help("Tokens generated"))
    responses_total: int = field(default=0, metadata=_help("Responses sent, heartbeats not counted"))
    slots: int = field(default=0, metadata=_help("Sequences that can run at once"))
    slots_used: int = field(default=0, metadata=_help("Sequences that run"))
    cache_blocks: int = field(default=0, metadata=_help("Blocks of the KV cache; 0: it has slots"))
    cache_blocks_free: int = field(default=0, metadata=_help("Blocks of the KV cache that no sequence has"))
    sequences_waiting: int = field(default=0, metadata=_help("Sequences that wait for a slot"))


def descriptions() -> dict[str, str]:
    """Return the help text of each field of EngineMetrics, by name."""
    return {field.name: field.metadata["help"] for field in fields(EngineMetrics)}
