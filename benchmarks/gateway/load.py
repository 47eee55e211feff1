"""Requests whose times are taken: over gRPC to tritonserver, or over HTTP to what stands before it.

HTTP is spoken over a plain socket, so that no client library is measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from deepseek_triton.clients import AsyncGrpcClient, GenerateRequest

PROMPT = "One"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Timed:
    """One answer. first_s, whole_s: from the request to its first event, and to its end."""

    first_s: float
    whole_s: float


Ask = Callable[[int], Awaitable[Timed]]  # the number of tokens → the answer


def over_grpc(client: AsyncGrpcClient) -> Ask:
    """Streams straight from tritonserver."""

    async def ask(num_tokens: int) -> Timed:
        start, first, count = time.perf_counter(), 0.0, 0
        async for chunk in client.stream(GenerateRequest(prompt=PROMPT, max_tokens=num_tokens)):
            first, count = first or time.perf_counter() - start, chunk.num_output_tokens
        if count != num_tokens:
            raise RuntimeError(f"a stream ended after {count} of {num_tokens} tokens")
        return Timed(first, time.perf_counter() - start)

    return ask


def over_http(url: str, model: str, key: str, *, is_streamed: bool = True) -> Ask:
    """`/v1/completions` with an API key, on a connection of its own for each request."""
    address = urlsplit(url)

    async def ask(num_tokens: int) -> Timed:
        body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "stream": is_streamed}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        start, first, text = time.perf_counter(), 0.0, b""
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + body)
            async with asyncio.timeout(TIMEOUT_S):
                while piece := await reader.read(65536):
                    text += piece
                    if not first and (b"data: " in text or not is_streamed):
                        first = time.perf_counter() - start
        finally:
            writer.close()
        if not text.startswith(b"HTTP/1.1 200") or (is_streamed and b"[DONE]" not in text):
            raise RuntimeError(f"a request failed: {text[:500]!r}")
        return Timed(first, time.perf_counter() - start)

    return ask


async def together(ask: Ask, num_requests: int, num_tokens: int, at_once: int) -> tuple[float, list[Timed]]:
    """Make `num_requests`, `at_once` of them at any time; returns the seconds for all, and each one's times."""
    left = iter(range(num_requests))
    answers: list[Timed] = []

    async def work() -> None:
        for _ in left:
            answers.append(await ask(num_tokens))

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return time.perf_counter() - start, answers
