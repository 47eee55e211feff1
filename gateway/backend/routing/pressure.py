"""Pressure: when there is more to do than servers for it, what isn't urgent is refused, and answers get shorter."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from deepseek_triton.clients import GenerateRequest
from deepseek_triton.gateway.backend.base import OverloadedError, UpstreamCall
from deepseek_triton.gateway.observe.routing_metrics import RoutingMetrics
from deepseek_triton.gateway.settings import GatewaySettings

# A request's priority → the share of the capacity up to which it is taken; 1 is the most urgent, 0 the default.
SHARES = {1: 1.25, 2: 1.0, 0: 1.0}
LESS_URGENT = 0.75
WEIGHT = 0.2  # of the newest first chunk's time in the mean


class Pressure:
    """Counts what runs of each model. num_servers: of a model, how many can take requests now."""

    def __init__(self, settings: GatewaySettings, num_servers: Callable[[str], int], metrics: RoutingMetrics) -> None:
        self._settings, self._num_servers, self._metrics = settings, num_servers, metrics
        self._running: Counter[str] = Counter()
        self._first_s: dict[str, float] = {}  # the mean of the last first chunks

    @contextlib.contextmanager
    def admit(self, model: str, priority: int | None) -> Iterator[None]:
        """Count one request while it runs. Raises `OverloadedError` where there is no room for it."""
        room = self._room(model) * SHARES.get(priority or 0, LESS_URGENT)
        if self._settings.capacity and self._running[model] >= room:
            self._metrics.shed.labels(model).inc()
            raise OverloadedError(f"the servers of the model '{model}' have enough to do; retry later")
        self._running[model] += 1
        try:
            yield
        finally:
            self._running[model] -= 1
            if not self._running[model]:
                del self._running[model]
                self._first_s.pop(model, None)  # nothing waits any more

    def first_chunk_came(self, model: str, seconds: float) -> None:
        """A stream of `model` has begun after so long."""
        before = self._first_s.get(model, seconds)
        self._first_s[model] = before + WEIGHT * (seconds - before)

    def shortened(self, model: str, request: GenerateRequest, call: UpstreamCall) -> GenerateRequest:
        """The request with a shorter answer, if there is pressure. A guided one keeps its length: cut, it is wrong."""
        limit = self._settings.pressure_max_tokens
        if not limit or request.guide_type is not None or not self._is_high(model):
            return request
        if request.max_tokens is not None and request.max_tokens <= limit:
            return request
        call.notes.degraded("shortened")
        self._metrics.degraded.labels(model, "shortened").inc()
        min_tokens = None if request.min_tokens is None else min(request.min_tokens, limit)
        return replace(request, max_tokens=limit, min_tokens=min_tokens)

    def _is_high(self, model: str) -> bool:
        settings = self._settings
        is_full = settings.capacity and self._running[model] > settings.pressure_share * self._room(model)
        is_slow = settings.pressure_first_s and self._first_s.get(model, 0.0) > settings.pressure_first_s
        return bool(is_full or is_slow)

    def _room(self, model: str) -> int:
        return self._settings.capacity * max(self._num_servers(model), 1)
