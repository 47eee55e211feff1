"""RoutingMetrics: what is counted of arms, servers, breakers and degraded answers.

The values of labels are bounded: names of routes and models, addresses of servers, outcomes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
DEGRADATIONS = ("fallback", "cached", "shortened")
FIRST_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class RoutingMetrics:
    """In the gateway's registry. name: what the client called; model: the arm that answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.arm_requests = Counter(
            "gateway_arm_requests", "Requests of a route's arm that have ended.", ("name", "model", "outcome"),
            registry=registry,
        )  # fmt: skip
        self.arm_s = Histogram(
            "gateway_arm_seconds", "What an arm takes for a whole answer.", ("name", "model"), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.arm_first_s = Histogram(
            "gateway_arm_first_chunk_seconds", "What an arm takes until a stream's first chunk.", ("name", "model"),
            buckets=FIRST_SECONDS, registry=registry,
        )  # fmt: skip
        self.backend_up = Gauge(
            "gateway_backend_up", "Whether a server answers probes.", ("backend",), registry=registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self.backend_live = Gauge(
            "gateway_backend_live", "Requests that a server has now.", ("backend",), registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.backend_drained = Gauge(
            "gateway_backend_drained", "Whether no worker sends a server new requests, as it is to be ended.",
            ("backend",), registry=registry, multiprocess_mode="livemin",
        )  # fmt: skip
        self.backend_requests = Counter(
            "gateway_backend_requests", "Requests to a server that have ended.", ("backend", "model", "outcome"),
            registry=registry,
        )  # fmt: skip
        self.backend_retries = Counter(
            "gateway_backend_retries", "Requests that were sent elsewhere after a server failed them, unseen.",
            ("backend", "model"), registry=registry,
        )  # fmt: skip
        self.breaker_open = Gauge(
            "gateway_breaker_open", "Whether a breaker is open, or tries its server again.", ("backend", "model"),
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.breaker_opened = Counter(
            "gateway_breaker_opened", "How often a breaker has opened.", ("backend", "model"), registry=registry
        )
        self.degraded = Counter(
            "gateway_degraded", "Answers that are less than was asked for: fallback, cached or shortened.",
            ("model", "how"), registry=registry,
        )  # fmt: skip
        self.shed = Counter(
            "gateway_shed", "Requests that were refused because the servers have enough to do.", ("model",),
            registry=registry,
        )  # fmt: skip

    def forget(self, address: str, models: Iterable[str]) -> None:
        """A server is no more: it is neither down nor broken. Files of several processes keep a series for ever."""
        if MULTIPROCESS in os.environ:
            self.backend_up.labels(address).set(1)
            self.backend_drained.labels(address).set(0)
            for model in models:
                self.breaker_open.labels(address, model).set(0)
            return
        self.backend_up.remove(address)
        self.backend_live.remove(address)
        self.backend_drained.remove(address)
        for model in models:
            self.breaker_open.remove(address, model)
