"""Send hostile requests through a gateway to a real tritonserver, beside a reference stream that must stay right.

    python -m benchmarks.gateway.hostile [--requests 10000] [--seed 1] [--repository model_repository --model smollm2]
adds to benchmarks/results/gateway-hostile.json, seed for seed; the exit status is 1 if anything died or was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.gateway.hostile_requests import HostileRequests
from benchmarks.machine import describe

RESULT = Path(__file__).parents[1] / "results" / "gateway-hostile.json"
REFERENCE_ID = "reference-stream"
WAIT_S = 20.0  # for an answer; a request that is cut short waits for it in vain
CONCURRENT = 12
# Short ones: many requests never end.
TIMES = ("--header-timeout-s", "2", "--body-timeout-s", "2")
STRAIGHT = 0.7  # of the clients wait for their answer; the others leave at once, or in the middle


@dataclass
class HostileResult:
    """statuses: how often each came; 0: none. failed: kinds and beginnings of requests that got a status 500 or 502.

    reference: streams that were right; wrong: texts that differ from the first, or errors.
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[tuple[str, int, str]] = field(default_factory=list)
    reference: int = 0
    wrong: list[str] = field(default_factory=list)


async def attack(url: str, model: str, num_requests: int, seed: int) -> HostileResult:
    """Send the requests of `seed` to the gateway at `url`."""
    result = HostileResult()
    requests = HostileRequests(model, seed, REFERENCE_ID)
    dice = random.Random(seed)
    number = iter(range(num_requests))
    expected = await _reference(url, model)

    async def send_some() -> None:
        for _ in number:
            kind, data = requests.next()
            status, text = await _send(url, data, waits=dice.random() < STRAIGHT)
            result.requests += 1
            result.statuses[status] += 1
            if status in (500, 502):
                result.failed.append((kind, status, f"{data[-300:]!r} → {text[-300:]!r}"))

    async def look() -> None:
        while True:
            try:
                text = await _reference(url, model)
            except (httpx.HTTPError, KeyError, IndexError) as error:
                text = repr(error)
            if text == expected:
                result.reference += 1
            else:
                result.wrong.append(text)
            await asyncio.sleep(0.05)

    looking = asyncio.create_task(look())
    await asyncio.gather(*(send_some() for _ in range(CONCURRENT)))
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    last = await _reference(url, model)
    if last != expected:
        result.wrong.append(last)
    return result


async def _reference(url: str, model: str) -> str:
    """The text of one stream, greedy."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count from one to ten."}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
    }
    text = ""
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream(
            "POST", f"{url}/v1/chat/completions", json=body, headers={"X-Request-Id": REFERENCE_ID}
        ) as response,
    ):
        if response.status_code != 200:
            return f"status {response.status_code}: {(await response.aread()).decode()[:300]}"
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line[6:])
                delta = event["choices"][0]["delta"]
                text += (delta.get("content") or "") + (delta.get("reasoning_content") or "")
    return text


async def _send(url: str, data: bytes, waits: bool) -> tuple[int, bytes]:
    """Send one request; the status of its answer, 0 without one, and the answer's beginning."""
    place = urlsplit(url)
    received = b""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(place.hostname, place.port), WAIT_S)
    except (OSError, asyncio.TimeoutError):
        return 0, b""
    try:
        writer.write(data)
        if not waits:
            await asyncio.sleep(0.02)
            # The kernel sends a reset instead of an end.
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()
            return 0, b""
        received = await asyncio.wait_for(reader.read(4096), WAIT_S)
    except (OSError, asyncio.TimeoutError):
        pass
    finally:
        writer.transport.abort()
    is_answer = received.startswith(b"HTTP/1.1 ") and received[9:12].isdigit()
    return (int(received[9:12]) if is_answer else 0), received


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the repository, open a gateway, attack it, and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args(argv)
    from benchmarks.gateway.process import gateway_process
    from deepseek_triton.ensemble.server.tritonserver import TritonServer

    start = time.monotonic()
    with (
        TritonServer(arguments.repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        gateway_process("--backend-url", server.grpc_url, "--model", arguments.model, *TIMES) as gateway,
    ):
        rss_mib = gateway.rss_mib()
        result = asyncio.run(attack(gateway.url, arguments.model, arguments.requests, arguments.seed))
        deaths = {"gateway": int(not gateway.lives()), "tritonserver": int(server.exit_status is not None)}
        figures = {
            **asdict(result),
            "statuses": {str(status): count for status, count in sorted(result.statuses.items())},
            "deaths": deaths,
            "gateway_rss_mib": {"before": round(rss_mib), "after": round(gateway.rss_mib())},
            "seconds": round(time.monotonic() - start),
            "seed": arguments.seed,
            "machine": describe(),
        }
    _record(figures)
    print(json.dumps({**figures, "failed": result.failed[:5], "wrong": result.wrong[:3]}, indent=2))
    return int(any(deaths.values()) or bool(result.wrong) or bool(result.failed))


def _record(figures: dict[str, Any]) -> None:
    """Add the run to the result, in place of one with its seed; the sums are those of all runs."""
    runs = json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.exists() else []
    runs = [run for run in runs if run["seed"] != figures["seed"]] + [figures]
    total = {
        "requests": sum(run["requests"] for run in runs),
        "deaths": sum(sum(run["deaths"].values()) for run in runs),
        "reference_streams": sum(run["reference"] for run in runs),
        "wrong_reference_streams": sum(len(run["wrong"]) for run in runs),
        "server_errors": sum(len(run["failed"]) for run in runs),
    }
    RESULT.write_text(json.dumps({"total": total, "runs": runs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
