"""The gateway's metrics, in one table of names. `/metrics` gives them in Prometheus's text format.

With several worker processes each counts by itself into files that PROMETHEUS_MULTIPROC_DIR names, and any of them
gives the sums of all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from deepseek_triton.gateway.observe.routing_metrics import MULTIPROCESS, RoutingMetrics

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
TOKEN_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
QUEUE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
UNKNOWN = "unknown"  # the label of a model that nobody serves, whatever a client calls it


class GatewayMetrics:
    """Everything that is counted; label values are bounded: routes, served models, statuses, kinds of tokens."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.routing = RoutingMetrics(registry)
        self.requests = Counter(
            "gateway_requests", "Requests that have ended.", ("route", "model", "status"), registry=registry
        )
        self.left = Counter("gateway_clients_left", "Clients that left before the answer's end.", ("route",),
                            registry=registry)  # fmt: skip
        self.tokens = Counter("gateway_tokens", "Tokens of prompts and answers.", ("model", "kind"), registry=registry)
        self.live = _gauge("gateway_live_requests", "Requests that run now.", ("method",), registry)
        self.upstream_live = _gauge("gateway_upstream_live", "Requests that are with the server now.", (), registry)
        self.request_s = _histogram(
            "gateway_request_seconds", "From a request's arrival to its end.", ("route",), REQUEST_SECONDS, registry
        )
        self.queue_s = _histogram(
            "gateway_queue_seconds", "From a request's arrival until it goes to the server.", ("model",),
            QUEUE_SECONDS, registry,
        )  # fmt: skip
        self.first_token_s = _histogram(
            "gateway_time_to_first_token_seconds", "From a request's arrival to the server's first token.", ("model",),
            FIRST_TOKEN_SECONDS, registry,
        )  # fmt: skip
        self.token_s = _histogram(
            "gateway_inter_token_seconds", "Between tokens of one answer, as the server gives them.", ("model",),
            TOKEN_SECONDS, registry,
        )  # fmt: skip
        self.upstream_s = _histogram(
            "gateway_upstream_seconds", "What the server takes for a whole request.", ("model", "outcome"),
            REQUEST_SECONDS, registry,
        )  # fmt: skip

        self.jobs_waiting = _gauge(
            "gateway_jobs_waiting", "Jobs that wait, in all gateways' queue.", ("priority",), registry, "livemax"
        )
        self.jobs_running = _gauge(
            "gateway_jobs_running", "Jobs that run, in all gateways' queue.", (), registry, "livemax"
        )
        self.jobs_dead = _gauge(
            "gateway_jobs_dead", "Jobs that failed too often and are kept.", (), registry, "livemax"
        )
        self.oldest_job_s = _gauge(
            "gateway_job_oldest_seconds", "The age of the oldest job that waits.", (), registry, "livemax"
        )
        self.queue_bytes = _gauge("gateway_queue_bytes", "Bytes of jobs and results in Redis.", (), registry, "livemax")
        self.job_attempts = Counter(
            "gateway_job_attempts", "Jobs that were run here: completed, failed, busy, retried, dead or lease_lost.",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.batches_active = _gauge(
            "gateway_batches_active", "Batches that haven't ended, of all gateways.", (), registry, "livemax"
        )
        self.oldest_batch_s = _gauge(
            "gateway_batch_oldest_seconds", "The age of the oldest batch that hasn't ended.", (), registry, "livemax"
        )
        self.files_bytes = _gauge("gateway_files_bytes", "Bytes in the directory of files.", (), registry, "livemax")
        self.batch_lines = Counter(
            "gateway_batch_lines", "Lines of batches whose results were written here: completed or failed.",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.webhooks = Counter(
            "gateway_webhooks", "Webhooks: delivered, retried or failed.", ("outcome",), registry=registry
        )

        self.key_expiry = _gauge(
            "gateway_key_expiry_timestamp_seconds", "When the next API key expires, in Unix time; +Inf: none does.",
            (), registry, "livemin",
        )  # fmt: skip
        self.key_expiry.set(math.inf)  # until the keys were looked at

        self.collected = Counter(
            "gateway_collected",
            "Answers and feedback that were to be kept: written, refused, dropped_full, redaction_failed,"
            " redaction_timeout, unfit, write_failed.",
            ("kind", "outcome"), registry=registry,
        )  # fmt: skip
        self.collection_bytes = _gauge(
            "gateway_collection_bytes", "Bytes of all that is collected.", (), registry, "livemax"
        )

    def text(self) -> bytes:
        """All values in Prometheus's text format."""
        if MULTIPROCESS not in os.environ:
            return generate_latest(self.registry)
        merged = CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)


def _histogram(
    name: str, text: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=registry)


def _gauge(
    name: str,
    text: str,
    labels: Sequence[str],
    registry: CollectorRegistry,
    of_workers: Literal["livesum", "livemax", "livemin"] = "livesum",
) -> Gauge:
    return Gauge(name, text, labels, registry=registry, multiprocess_mode=of_workers)
