"""CanaryBackend: a name that clients call is answered by one of several models, each of which has its share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace

from deepseek_triton.clients import Chunk, Embedding, GenerateRequest, Generation, Score, ScoreRequest, ServedModel
from deepseek_triton.gateway.backend.base import Backend, UpstreamCall
from deepseek_triton.gateway.backend.routing.shares import RouteFile
from deepseek_triton.gateway.backend.verdict import verdict_of
from deepseek_triton.gateway.observe.routing_metrics import RoutingMetrics


@dataclass(frozen=True)
class _Picked:
    """The model that a call goes to. is_counted: it is an arm's."""

    model: str
    is_counted: bool


class CanaryBackend:
    """Implements `Backend` by `backend`, which answers each arm's model; names without a route pass through."""

    def __init__(self, backend: Backend, routes: RouteFile, metrics: RoutingMetrics) -> None:
        self._backend, self._routes, self._metrics = backend, routes, metrics

    async def open(self) -> None:
        await self._backend.open()

    async def close(self) -> None:
        await self._backend.close()

    async def is_ready(self) -> bool:
        return await self._backend.is_ready()

    async def models(self) -> tuple[ServedModel, ...]:
        """The models, and the names of routes one of whose arms is there."""
        served = {model.name: model for model in await self._backend.models()}
        for name, route in self._routes.current().items():
            there = [served[arm.model] for arm in route.arms if arm.model in served]
            if there:
                served.setdefault(name, replace(there[0], name=name))
        return tuple(served.values())

    async def check_model(self, name: str) -> None:
        await self._backend.check_model(self._main(name))

    async def max_seq_len(self, model: str) -> int:
        return await self._backend.max_seq_len(self._main(model))

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        with self._arm(model, call) as picked:
            return await self._backend.generate(picked.model, request, call)

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        began = time.perf_counter()
        with self._arm(model, call) as picked:
            is_told = not picked.is_counted
            async with contextlib.aclosing(self._backend.stream(picked.model, request, call)) as chunks:
                async for chunk in chunks:
                    if not is_told:
                        is_told = True
                        self._metrics.arm_first_s.labels(model, picked.model).observe(time.perf_counter() - began)
                    yield chunk

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        with self._arm(model, call) as picked:
            async with contextlib.aclosing(self._backend.report(picked.model, image, call)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        with self._arm(model, call) as picked:
            return await self._backend.score(picked.model, request, call)

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        with self._arm(model, call) as picked:
            return await self._backend.embed(picked.model, texts, call)

    @contextlib.contextmanager
    def _arm(self, name: str, call: UpstreamCall) -> Iterator[_Picked]:
        """The model that answers a call of `name`; its end is counted."""
        route = self._routes.current().get(name)
        if route is None:
            yield _Picked(name, is_counted=False)
            return
        arm = route.pick(name, call.caller, call.notes.lot)
        began, outcome = time.perf_counter(), "answered"
        try:
            yield _Picked(arm, is_counted=True)
        except BaseException as error:
            outcome = verdict_of(error)
            raise
        finally:
            self._metrics.arm_requests.labels(name, arm, outcome).inc()
            if outcome == "answered":
                self._metrics.arm_s.labels(name, arm).observe(time.perf_counter() - began)

    def _main(self, name: str) -> str:
        """The arm of `name` with the largest share."""
        route = self._routes.current().get(name)
        return name if route is None else max(route.arms, key=lambda arm: arm.weight).model
