"""Requests/s of one worker and of several, whole answers of a backend that answers at once: what the gateway can do.

    python -m benchmarks.gateway.workers [--workers 1 2] [--requests 3000]
writes benchmarks/results/gateway-workers.json. The client runs on the same cores: its CPU time is told beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gateway.load import over_http, together
from benchmarks.gateway.memory import MODEL
from benchmarks.gateway.process import app_process
from benchmarks.machine import describe

RESULT = Path(__file__).parents[1] / "results" / "gateway-workers.json"
AT_ONCE = 32
WARM_UP = 200


def measure(num_workers: int, num_requests: int) -> dict[str, Any]:
    """Requests/s through a gateway of so many workers, each request on a connection of its own."""
    with app_process("benchmarks.gateway.memory:EchoBackend", workers=num_workers) as gateway:
        ask = over_http(gateway.url, MODEL, "none", is_streamed=False)

        async def load() -> float:
            await together(ask, WARM_UP, 10, AT_ONCE)
            return (await together(ask, num_requests, 10, AT_ONCE))[0]

        start = time.process_time()
        seconds = asyncio.run(load())
        client_s = time.process_time() - start
    return {
        "workers": num_workers,
        "requests_per_s": round(num_requests / seconds, 1),
        "client_cpu_share_of_a_core": round(client_s / seconds, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of workers in turn, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, default=3000)
    arguments = parser.parse_args(argv)
    found = [measure(count, arguments.requests) for count in arguments.workers]
    scale = round(found[-1]["requests_per_s"] / found[0]["requests_per_s"], 2)
    figures = {"runs": found, "scale": scale, "machine": describe()}
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
