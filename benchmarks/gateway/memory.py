"""The gateway's memory over 100,000 requests, streams and whole answers, right and wrong, with a fake backend.

    python -m benchmarks.gateway.memory [--requests 100000]
writes benchmarks/results/gateway-memory.json; the exit status is 1 if it grew by more than 8 MiB after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.gateway.process import RunningGateway, app_process
from benchmarks.machine import describe
from deepseek_triton.clients import Chunk, GenerateRequest, Generation, Score, ScoreRequest, ServedModel
from deepseek_triton.gateway.backend.base import UnknownModelError, UpstreamCall

RESULT = Path(__file__).parents[1] / "results" / "gateway-memory.json"
MODEL = "fake"
CONCURRENT = 16
LIMIT_MIB = 8.0
CHAT: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello, you there. " * 20}]}
# What is sent in turn: a path and a body.
TURNS: tuple[tuple[str, dict[str, object]], ...] = (
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "model": "unknown"}),
    ("/v1/chat/completions", {**CHAT, "temperature": "hot"}),
    ("/v1/completions", {"model": MODEL, "prompt": "Hello"}),
    ("/v1/responses", {"model": MODEL, "input": "Hello", "store": False}),
)


class EchoBackend:
    """A `Backend` that answers ten tokens at once."""

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def is_ready(self) -> bool:
        """Always."""
        return True

    async def models(self) -> tuple[ServedModel, ...]:
        """The one model."""
        return (ServedModel(MODEL, "generate"),)

    async def check_model(self, model: str) -> None:
        """Raise `UnknownModelError` for another than the one model."""
        if model != MODEL:
            raise UnknownModelError(f"the model '{model}' does not exist")

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        """All at once."""
        return Generation.all_from_chunks([chunk async for chunk in self.stream(model, request, call)])

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Token for token."""
        await self.check_model(model)
        for index in range(10):
            await asyncio.sleep(0)
            yield Chunk("word ", "stop" if index == 9 else "", 5, index + 1)

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        raise UnknownModelError(f"the model '{model}' doesn't report")
        yield  # makes it a generator

    async def score(self, model: str, request: ScoreRequest) -> tuple[Score, ...]:
        """It scores nothing."""
        raise UnknownModelError(f"the model '{model}' doesn't score")

    async def max_seq_len(self, model: str) -> int:
        """Tokens of a prompt and its answer."""
        return 512


async def load(gateway: RunningGateway, num_requests: int) -> list[tuple[int, float]]:
    """Send the requests; after each tenth: how many were sent, and the gateway's memory in MiB."""
    points = []
    sent = 0
    place = urlsplit(gateway.url)

    async def send_some(count: int) -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        for _ in range(count):
            path, body = TURNS[sent % len(TURNS)]
            sent += 1
            text = json.dumps(body).encode()
            head = (
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-Id: request-{sent}\r\n"
            )
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text)
            status = await _read_answer(reader)
            if status not in (200, 400, 404):
                raise RuntimeError(f"{path} answered {status}")
        writer.close()
        await writer.wait_closed()

    for _ in range(10):
        await asyncio.gather(*(send_some(num_requests // 10 // CONCURRENT) for _ in range(CONCURRENT)))
        points.append((sent, round(gateway.rss_mib(), 1)))
        print(*points[-1], flush=True)
    return points


async def _read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer to its end; its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    if length:
        await reader.readexactly(int(length[1]))
    else:
        await reader.readuntil(b"\r\n0\r\n\r\n")
    return int(head[9:12])


def growth_mib(points: Sequence[tuple[int, float]]) -> float:
    """How much memory was added after the first tenth, by which every cache is full."""
    return max(rss_mib for _, rss_mib in points[1:]) - points[0][1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with app_process("benchmarks.gateway.memory:EchoBackend", tokens_per_minute=10**12) as gateway:
        points = asyncio.run(load(gateway, arguments.requests))
    growth = growth_mib(points)
    figures = {
        "requests_and_rss_mib": points,
        "growth_mib": round(growth, 1),
        "limit_mib": LIMIT_MIB,
        "seconds": round(time.monotonic() - start),
        "machine": describe(),
    }
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return int(growth > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
