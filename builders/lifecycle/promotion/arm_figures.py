"""What the gateways' metrics say of each arm of a name, and whether a candidate does as well as the base."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ArmFigures:
    """Counts since the gateways' start, or between two looks. *_s: sums of seconds; *_count: of what they are sums."""

    answered: float = 0.0
    failed: float = 0.0
    total_s: float = 0.0
    total_count: float = 0.0
    first_s: float = 0.0
    first_count: float = 0.0
    breaker_opened: float = 0.0

    @property
    def ended(self) -> float:
        """Requests that the model itself ended: those that clients left or got wrong aren't counted."""
        return self.answered + self.failed

    def since(self, before: ArmFigures) -> ArmFigures:
        """What came after `before`."""
        return ArmFigures(*(getattr(self, name) - getattr(before, name) for name in FIELDS))

    def plus(self, other: ArmFigures) -> ArmFigures:
        """Both together."""
        return ArmFigures(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    @property
    def is_of_restart(self) -> bool:
        """Whether a count has fallen: a gateway was started anew between the two looks."""
        return any(getattr(self, name) < 0 for name in FIELDS)


FIELDS = tuple(ArmFigures.__dataclass_fields__)
# Metric, and its outcome label → the field.
METRICS = {
    ("gateway_arm_requests_total", "answered"): "answered",
    ("gateway_arm_requests_total", "failed"): "failed",
    ("gateway_arm_seconds_sum", ""): "total_s",
    ("gateway_arm_seconds_count", ""): "total_count",
    ("gateway_arm_first_chunk_seconds_sum", ""): "first_s",
    ("gateway_arm_first_chunk_seconds_count", ""): "first_count",
}


def read_figures(text: str, name: str, model: str) -> ArmFigures:
    """The figures of `name`'s arm `model` in Prometheus' text."""
    values = dict.fromkeys(FIELDS, 0.0)
    for line in text.splitlines():
        if not (match := SAMPLE.match(line)):
            continue
        metric, labels, value = match[1], dict(LABEL.findall(match[2])), float(match[3])
        if labels.get("model") != model:
            continue
        if metric == "gateway_breaker_opened_total":
            values["breaker_opened"] += value
        elif labels.get("name") == name and (field := METRICS.get((metric, labels.get("outcome", "")))):
            values[field] += value
    return ArmFigures(**values)


def ask_gateways(urls: Sequence[str], name: str, models: Sequence[str]) -> dict[str, ArmFigures]:
    """Model → its figures, of all gateways together. Raises `OSError` if one doesn't answer."""
    found = dict.fromkeys(models, ArmFigures())
    for url in urls:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S) as response:
            text = response.read().decode("utf-8", "replace")
        found = {model: figures.plus(read_figures(text, name, model)) for model, figures in found.items()}
    return found


@dataclass(frozen=True)
class CanaryBounds:
    """What a candidate must keep. max_latency_ratio: of its mean times to the base's, once both have min_requests."""

    min_requests: int = 20
    max_error_rate: float = 0.01
    max_latency_ratio: float = 2.0

    def fault(self, candidate: ArmFigures, base: ArmFigures) -> str:
        """Why the candidate must go; empty: it may stay."""
        if candidate.breaker_opened:
            return "the breaker of the candidate opened"
        if candidate.failed > self.max_error_rate * max(candidate.ended, self.min_requests):
            return (
                f"{candidate.failed:.0f} of {candidate.ended:.0f} requests failed, more than {self.max_error_rate:.1%}"
            )
        for what, total, count in (("answer", "total_s", "total_count"), ("first chunk", "first_s", "first_count")):
            counts = getattr(candidate, count), getattr(base, count)
            if min(counts) >= self.min_requests:
                own, other = getattr(candidate, total) / counts[0], getattr(base, total) / counts[1]
                if own > other * self.max_latency_ratio:
                    return (
                        f"the mean time to the {what} is {own:.3f} s, the base's {other:.3f} s: "
                        f"more than {self.max_latency_ratio:g} times as long"
                    )
        return ""
