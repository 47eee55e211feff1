"""Observer: all that is recorded of requests. The middleware tells it of HTTP requests, the backend of calls."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from deepseek_triton.gateway.observe.metrics import UNKNOWN, GatewayMetrics
from deepseek_triton.gateway.observe.tracing import Tracer

# When the HTTP request began whose task this is, and its trace headers; a background answer keeps its request's.
arrived_at: ContextVar[float] = ContextVar("arrived_at")
trace_headers: ContextVar[dict[str, str]] = ContextVar("trace_headers")


@dataclass
class Observer:
    """logs_prompts: whether log lines hold what goes to the model."""

    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    tracer: Tracer = field(default_factory=Tracer)
    logs_prompts: bool = False
    _served: set[str] = field(default_factory=set)

    def serves(self, model: str) -> None:
        """A model of this name has been called: its name may be a label."""
        self._served.add(model)

    def label(self, model: str | None) -> str:
        """A model's label: its name if it is served, so that clients' words make no new series."""
        if model is None:
            return ""
        return model if model in self._served else UNKNOWN


def since_arrival() -> float:
    """Seconds since this task's HTTP request came."""
    now = time.perf_counter()
    return now - arrived_at.get(now)
