"""ObserveMiddleware: the outermost one. Each HTTP request gets its id, its span, its counts and its log line."""

from __future__ import annotations

import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_triton.gateway.observe.logs import log_request
from deepseek_triton.gateway.observe.observer import Observer, arrived_at, trace_headers
from deepseek_triton.gateway.observe.tracing import PASSED_ON
from deepseek_triton.gateway.record import record_of

OTHER = "other"  # the route of a path that there isn't
UNTOLD = ("/metrics", "/health", "/health/live", "/health/ready")  # whose requests get no log line


class ObserveMiddleware:
    """Sets X-Request-Id on every response, and records each request when it has ended."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        record = record_of(scope)
        sent = Headers(scope=scope)
        arrived_at.set(began)
        trace_headers.set({name: sent[name] for name in PASSED_ON if name in sent})

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(record.headers())
                record.route.is_told = True
            await send(message)

        live = self._observer.metrics.live.labels(scope["method"])
        live.inc()
        try:
            with self._observer.tracer.request(scope["method"], sent) as span:
                try:
                    await self._app(scope, receive, observed)
                finally:
                    fields = self._fields(scope, status)
                    # The route is known now; a path would make a name of every id in it.
                    span.update_name(f"{scope['method']} {fields['route']}")
                    for name in ("request_id", "model", "status", "input_tokens", "output_tokens"):
                        span.set_attribute(f"gateway.{name}", fields[name])
                    self._record(scope, fields, time.perf_counter() - began)
        finally:
            live.dec()

    def _record(self, scope: Scope, fields: dict[str, Any], seconds: float) -> None:
        metrics, route, status = self._observer.metrics, fields["route"], fields["status"]
        metrics.requests.labels(route, fields["model"], str(status)).inc()
        metrics.request_s.labels(route).observe(seconds)
        if fields["has_left"]:
            metrics.left.labels(route).inc()
        if scope["path"] not in UNTOLD:
            log_request(f"{scope['method']} {route} {status}", {**fields, "seconds": round(seconds, 4)})

    def _fields(self, scope: Scope, status: int) -> dict[str, Any]:
        """What is known of a request at its end."""
        record = record_of(scope)
        return {
            "request_id": record.request_id,
            "route": route_of(scope),
            "status": status,
            "model": self._observer.label(record.model),
            "owner": record.owner,
            "is_streamed": record.is_streamed,
            "has_left": record.has_left,
            "input_tokens": record.usage.input,
            "output_tokens": record.usage.output,
            "cached_tokens": record.usage.cached,
            "reasoning_tokens": record.usage.reasoning,
        }


def route_of(scope: Scope) -> str:
    """The route's pattern, so that ids in paths make no new series."""
    route = scope.get("route")
    return str(getattr(route, "path", OTHER)) if route is not None else OTHER
