"""ObservedBackend: a Backend whose calls are timed, counted and traced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import replace

from deepseek_triton.clients import Chunk, Embedding, GenerateRequest, Generation, Score, ScoreRequest, ServedModel
from deepseek_triton.gateway.backend.base import Backend, UnknownModelError, UpstreamCall
from deepseek_triton.gateway.observe.logs import log_prompt
from deepseek_triton.gateway.observe.observer import Observer, since_arrival, trace_headers


class ObservedBackend:
    """Implements `Backend` by `backend`."""

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self._backend, self._observer = backend, observer

    async def open(self) -> None:
        await self._backend.open()

    async def close(self) -> None:
        await self._backend.close()

    async def is_ready(self) -> bool:
        return await self._backend.is_ready()

    async def models(self) -> tuple[ServedModel, ...]:
        return await self._backend.models()

    async def check_model(self, name: str) -> None:
        await self._backend.check_model(name)
        self._observer.serves(name)

    async def max_seq_len(self, model: str) -> int:
        return await self._backend.max_seq_len(model)

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        with self._call(model, call) as own:
            self._tell(request, model, call)
            generations = await self._backend.generate(model, request, own)
        self._count(model, generations)
        return generations

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        with self._call(model, call) as own:
            self._tell(request, model, call)
            async with contextlib.aclosing(self._observed(model, self._backend.stream(model, request, own))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        with self._call(model, call) as own:
            async with contextlib.aclosing(self._observed(model, self._backend.report(model, image, own))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _observed(self, model: str, source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """The chunks of a stream, whose times and tokens are counted."""
        metrics, last, before = self._observer.metrics, 0.0, 0
        newest: dict[int, Chunk] = {}
        try:
            async with contextlib.aclosing(source) as chunks:
                async for chunk in chunks:
                    now = time.perf_counter()
                    newest[chunk.sequence_index] = chunk
                    count = sum(each.num_output_tokens for each in newest.values())
                    if not last:
                        self._observer.serves(model)
                        metrics.first_token_s.labels(model).observe(since_arrival())
                        last, before = now, count
                    elif count > before:
                        between = metrics.token_s.labels(model)
                        for _ in range(count - before):
                            between.observe((now - last) / (count - before))
                        last, before = now, count
                    yield chunk
        finally:
            self._count(model, newest.values())

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        with self._call(model, call) as own:
            return await self._backend.score(model, request, own)

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        with self._call(model, call) as own:
            return await self._backend.embed(model, texts, own)

    @contextlib.contextmanager
    def _call(self, model: str, call: UpstreamCall) -> Iterator[UpstreamCall]:
        metrics, began, outcome = self._observer.metrics, time.perf_counter(), "failed"
        waited = since_arrival()
        is_known = True
        metrics.upstream_live.inc()
        try:
            with self._observer.tracer.call(model, trace_headers.get({})) as headers:
                yield replace(call, headers={**call.headers, **headers})
            outcome = "answered"
        except UnknownModelError:
            is_known = False
            raise
        except BaseException as error:
            outcome = "failed" if isinstance(error, Exception) else "given_up"
            raise
        finally:
            metrics.upstream_live.dec()
            if is_known:
                if outcome == "answered":
                    self._observer.serves(model)
                label = self._observer.label(model)
                metrics.queue_s.labels(label).observe(waited)
                metrics.upstream_s.labels(label, outcome).observe(time.perf_counter() - began)

    def _tell(self, request: GenerateRequest, model: str, call: UpstreamCall) -> None:
        if self._observer.logs_prompts:
            log_prompt(call.request_id, model, request)

    def _count(self, model: str, answers: Iterable[Chunk | Generation]) -> None:
        """Add the tokens of an answer's sequences, as far as they have come."""
        tokens, label = self._observer.metrics.tokens, self._observer.label(model)
        parts = list(answers)
        if not parts:
            return
        tokens.labels(label, "input").inc(parts[0].num_input_tokens)
        tokens.labels(label, "cached").inc(parts[0].num_cached_tokens or 0)
        tokens.labels(label, "output").inc(sum(part.num_output_tokens for part in parts))
        tokens.labels(label, "reasoning").inc(sum(part.num_reasoning_tokens or 0 for part in parts))
