"""Spans of OpenTelemetry: one for each HTTP request, one in it for each call of the server, which gets `traceparent`.

Without `--trace-endpoint` nothing is recorded, and a client's own `traceparent` goes on to the server as it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

PASSED_ON = ("traceparent", "tracestate")


class Tracer:
    """Gives spans. provider: OpenTelemetry's TracerProvider; None: no spans, headers are passed on."""

    def __init__(self, provider: Any = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("deepseek_triton.gateway")
        self._provider = provider

    @contextlib.contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of an HTTP request, below the client's own: it has `set_attribute` and `update_name`."""
        if self._tracer is None:
            yield _NoSpan()
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(name, context=extract(dict(headers)), kind=SpanKind.SERVER) as span:
            yield span

    @contextlib.contextmanager
    def call(self, model: str, headers: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """The span of a call of the server, and the headers that tell the server of it."""
        if self._tracer is None:
            yield {name: headers[name] for name in PASSED_ON if name in headers}
            return
        from opentelemetry.propagate import inject
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(f"triton {model}", kind=SpanKind.CLIENT):
            carrier: dict[str, str] = {}
            inject(carrier)
            yield carrier

    def close(self) -> None:
        """Send what is still here."""
        if self._provider is not None:
            self._provider.shutdown()


class _NoSpan:
    def update_name(self, name: str) -> None:
        """Keep nothing."""

    def set_attribute(self, name: str, value: object) -> None:
        """Keep nothing."""


def make_tracer(endpoint: str) -> Tracer:
    """The tracer that sends spans to an OTLP collector over HTTP; endpoint: as http://localhost:4318, empty: none.

    Raises:
        ImportError: the packages of the extra `trace` are missing.
    """
    if not endpoint:
        return Tracer()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "deepseek-triton-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces")))
    return Tracer(provider)
