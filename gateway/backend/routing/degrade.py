"""DegradingBackend: when the servers of a model fail, another model answers, or what was answered before; else 503.

Each request begins with its own model, so that a fallback is left as soon as a breaker closes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence

from deepseek_triton.clients import (
    Chunk,
    Embedding,
    GenerateRequest,
    Generation,
    RequestTimeout,
    Score,
    ScoreRequest,
    ServedModel,
)
from deepseek_triton.gateway.backend.base import Backend, UnknownModelError, UpstreamCall
from deepseek_triton.gateway.backend.routing.answer_cache import AnswerCache, as_chunk
from deepseek_triton.gateway.backend.routing.pressure import Pressure
from deepseek_triton.gateway.backend.verdict import verdict_of
from deepseek_triton.gateway.observe.routing_metrics import RoutingMetrics
from deepseek_triton.gateway.settings import GatewaySettings, fallback_chains


class DegradingBackend:
    """Implements `Backend` by `backend`."""

    def __init__(
        self, backend: Backend, settings: GatewaySettings, pressure: Pressure, metrics: RoutingMetrics
    ) -> None:
        self._backend, self._pressure, self._metrics = backend, pressure, metrics
        self._chains = fallback_chains(settings.fallbacks)
        self._cache = AnswerCache(settings.answer_cache_bytes, settings.answer_cache_s)

    async def open(self) -> None:
        await self._backend.open()

    async def close(self) -> None:
        await self._backend.close()

    async def is_ready(self) -> bool:
        return await self._backend.is_ready()

    async def models(self) -> tuple[ServedModel, ...]:
        return await self._backend.models()

    async def check_model(self, name: str) -> None:
        """Raise `UnknownModelError` unless a model of this name, or one of its fallbacks, generates text."""
        chain = (name, *self._chains.get(name, ()))
        for index, model in enumerate(chain):
            try:
                return await self._backend.check_model(model)
            except Exception as error:
                if index == len(chain) - 1 or not _may_fall_back(error):
                    raise

    async def max_seq_len(self, model: str) -> int:
        return await self._backend.max_seq_len(model)

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        with self._pressure.admit(model, request.priority):
            asked = self._pressure.shortened(model, request, call)
            key = self._cache.key(model, request) if asked is request else None
            fall = self._fall(model, call)
            for candidate in fall.models:
                try:
                    answers = await self._backend.generate(candidate, asked, call)
                except Exception as error:
                    fall.failed(error)
                    continue
                fall.answered(candidate)
                if key is not None and candidate == model:
                    self._cache.put(key, answers)
                return answers
            return fall.kept(self._cache.get(key))

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        began = time.perf_counter()
        with self._pressure.admit(model, request.priority):
            asked = self._pressure.shortened(model, request, call)
            key = self._cache.key(model, request) if asked is request else None
            fall = self._fall(model, call)
            for candidate in fall.models:
                parts = []
                try:
                    async with contextlib.aclosing(self._backend.stream(candidate, asked, call)) as chunks:
                        async for chunk in chunks:
                            if not fall.is_answered:
                                fall.answered(candidate)
                                self._pressure.first_chunk_came(model, time.perf_counter() - began)
                            if key is not None and candidate == model:
                                parts.append(chunk)
                            yield chunk
                except Exception as error:
                    fall.failed(error)
                    continue
                if key is not None and parts:
                    self._cache.put(key, Generation.all_from_chunks(parts))
                return
            for answer in fall.kept(self._cache.get(key)):
                yield as_chunk(answer)

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        with self._pressure.admit(model, None):
            async with contextlib.aclosing(self._backend.report(model, image, call)) as chunks:
                async for chunk in chunks:
                    yield chunk
        call.notes.answered_by(model)

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        with self._pressure.admit(model, None):
            scores = await self._backend.score(model, request, call)
        call.notes.answered_by(model)
        return scores

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        with self._pressure.admit(model, None):
            embeddings = await self._backend.embed(model, texts, call)
        call.notes.answered_by(model)
        return embeddings

    def _fall(self, model: str, call: UpstreamCall) -> _Fall:
        return _Fall((model, *self._chains.get(model, ())), call, self._metrics)


class _Fall:
    """The way of one request down the chain. models: to be asked in this order; is_answered: one has begun to."""

    def __init__(self, models: tuple[str, ...], call: UpstreamCall, metrics: RoutingMetrics) -> None:
        self.models = models
        self.is_answered = False
        self._call, self._metrics = call, metrics
        self._first_error: Exception | None = None

    def failed(self, error: Exception) -> None:
        """A model didn't answer. Raises where no other may: the first one's error, which the client is told."""
        is_first = self._first_error is None
        if is_first:
            self._first_error = error
        # What a fallback refuses, as a prompt that is too long for it, is no fault of the client.
        may_go_on = not is_first or _may_fall_back(error, has_fallback=len(self.models) > 1)
        if self.is_answered:
            raise error
        if not may_go_on or self._call.notes.is_told:
            raise self._first_error or error

    def answered(self, model: str) -> None:
        """A model answers."""
        self.is_answered = True
        self._call.notes.answered_by(model)
        if model != self.models[0]:
            self._degraded("fallback")

    def kept(self, answers: tuple[Generation, ...]) -> tuple[Generation, ...]:
        """No model answers: an answer that was kept does. Raises the first error where there is none."""
        assert self._first_error is not None
        if not answers:
            raise self._first_error
        self._call.notes.answered_by(self.models[0])
        self._degraded("cached")
        return answers

    def _degraded(self, how: str) -> None:
        self._call.notes.degraded(how)
        self._metrics.degraded.labels(self.models[0], how).inc()


def _may_fall_back(error: Exception, *, has_fallback: bool = True) -> bool:
    """Whether a server's failure is the reason, and time is left."""
    if isinstance(error, UnknownModelError):
        return has_fallback
    return verdict_of(error) == "failed" and not isinstance(error, RequestTimeout)
