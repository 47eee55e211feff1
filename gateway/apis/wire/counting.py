"""Requests to the backend whose tokens are counted in the HTTP request's record as they come."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from deepseek_triton.clients import Chunk, GenerateRequest, Generation
from deepseek_triton.gateway.backend.base import Backend, UpstreamCall
from deepseek_triton.gateway.record import RequestRecord, TokenUsage


async def generate(
    backend: Backend, model: str, request: GenerateRequest, record: RequestRecord, suffix: str = ""
) -> tuple[Generation, ...]:
    """`Backend.generate`; suffix: of the request's id, where one HTTP request makes several."""
    generations = await backend.generate(model, request, call_of(record, suffix))
    counter = _Counter(record.usage)
    for generation in generations:
        counter.count(generation)
    return generations


async def stream(
    backend: Backend, model: str, request: GenerateRequest, record: RequestRecord, suffix: str = ""
) -> AsyncGenerator[Chunk, None]:
    """`Backend.stream`; the record is right after each chunk."""
    counter = _Counter(record.usage)
    async with contextlib.aclosing(backend.stream(model, request, call_of(record, suffix))) as chunks:
        async for chunk in chunks:
            counter.count(chunk)
            yield chunk


async def report(backend: Backend, model: str, image: bytes, record: RequestRecord) -> AsyncGenerator[Chunk, None]:
    """`Backend.report`; the record is right after each chunk."""
    counter = _Counter(record.usage)
    async with contextlib.aclosing(backend.report(model, image, call_of(record))) as chunks:
        async for chunk in chunks:
            counter.count(chunk)
            yield chunk


def call_of(record: RequestRecord, suffix: str = "") -> UpstreamCall:
    """What goes with a request of the HTTP request that `record` is of."""
    return UpstreamCall(record.request_id + suffix, caller=record.caller, notes=record.route)


class _Counter:
    """Adds one request's tokens to a usage."""

    def __init__(self, usage: TokenUsage) -> None:
        self._usage = usage
        self._num_input_tokens = 0
        self._num_cached_tokens = 0
        self._num_output_tokens: dict[int, int] = {}
        self._num_reasoning_tokens: dict[int, int] = {}

    def count(self, chunk: Chunk | Generation) -> None:
        """Add what is new in `chunk`, whose numbers are those of its sequence so far."""
        self._usage.input += chunk.num_input_tokens - self._num_input_tokens
        self._num_input_tokens = chunk.num_input_tokens
        self._usage.output += chunk.num_output_tokens - self._num_output_tokens.get(chunk.sequence_index, 0)
        self._num_output_tokens[chunk.sequence_index] = chunk.num_output_tokens
        if chunk.num_cached_tokens is not None:  # of the one prompt of all sequences
            self._usage.cached += chunk.num_cached_tokens - self._num_cached_tokens
            self._num_cached_tokens = chunk.num_cached_tokens
        if chunk.num_reasoning_tokens is not None:
            before = self._num_reasoning_tokens.get(chunk.sequence_index, 0)
            self._usage.reasoning += chunk.num_reasoning_tokens - before
            self._num_reasoning_tokens[chunk.sequence_index] = chunk.num_reasoning_tokens
