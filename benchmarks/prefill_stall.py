"""Measure how long prompts stall running streams: 99th percentile of the time between two tokens.

Streams run through the real server, with and without a prompt of 2,000 tokens arriving among them, in turn.
    python -m benchmarks.prefill_stall [--streams 4] [--rounds 3]
writes benchmarks/results/prefill-stall.json; the status is 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer

RESULTS = Path(__file__).parent / "results"
NAME = "bench"
MAX_SEQ_LEN = 2560
PROMPT_TOKENS = 2000
TOKENS = 160  # of each stream
TARGET = 3.0  # p99 with the prompt over p99 without
WARM_UP_TOKENS = 10


def intervals(client: GrpcClient, seed: int, started: threading.Barrier) -> list[float]:
    """Seconds between the tokens of one stream; the tokens of one response share its interval equally."""
    found, last, count = [], 0.0, 0
    request = GenerateRequest(prompt=f"{seed} 2 3 4 5 6 7 8", max_tokens=TOKENS, min_tokens=TOKENS)
    for chunk in client.stream(request):
        now = time.perf_counter()
        new = chunk.num_output_tokens - count
        if count >= WARM_UP_TOKENS and new:
            found += [(now - last) / new] * new
        if count < WARM_UP_TOKENS <= chunk.num_output_tokens:
            started.wait()
        last, count = time.perf_counter(), chunk.num_output_tokens
    return found


def measure(client: GrpcClient, streams: int, prompt: str | None, seed: int) -> tuple[list[float], float]:
    """All intervals of the streams, and the time to first token of the prompt that arrives, in seconds."""
    started = threading.Barrier(streams + 1)
    with ThreadPoolExecutor(streams) as pool:
        running = [pool.submit(intervals, client, seed * 100 + i, started) for i in range(streams)]
        started.wait()
        first_s = 0.0
        if prompt is not None:
            start = time.perf_counter()
            answer = client.generate(GenerateRequest(prompt=prompt, max_tokens=1))
            first_s = time.perf_counter() - start
            if abs(answer.num_input_tokens - PROMPT_TOKENS) > 5:
                raise RuntimeError(f"the prompt has {answer.num_input_tokens} tokens")
        return [value for stream in running for value in stream.result()], first_s


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile: `share` of the values lie below it."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        build(BuildOptions(smollm2(), NAME, repository, max_seq_len=MAX_SEQ_LEN))
        with (
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
            GrpcClient(server.grpc_url, NAME) as client,
        ):
            for number in range(arguments.rounds + 1):
                prompt = f"{number} " + "word " * (PROMPT_TOKENS - 2)  # none is found in a cache
                without, _ = measure(client, arguments.streams, None, 2 * number)
                with_prompt, first_s = measure(client, arguments.streams, prompt, 2 * number + 1)
                figures = {
                    "p50_without_ms": percentile(without, 0.5) * 1e3,
                    "p99_without_ms": percentile(without, 0.99) * 1e3,
                    "p50_with_ms": percentile(with_prompt, 0.5) * 1e3,
                    "p99_with_ms": percentile(with_prompt, 0.99) * 1e3,
                    "prompt_first_token_s": first_s,
                }
                print(f"round {number}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)
                if number:  # the first warms up: the budget learns
                    rounds.append(figures)
    ratio = statistics.median(figures["p99_with_ms"] / figures["p99_without_ms"] for figures in rounds)
    result = {
        "machine": describe(),
        "model": "SmolLM2-135M-Instruct, float32",
        "streams": arguments.streams,
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": [{name: round(value, 2) for name, value in figures.items()} for figures in rounds],
        "p99_ratio": {"median": round(ratio, 3), "target": TARGET},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prefill-stall.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"p99 with over without: {ratio:.2f} (target {TARGET}) {'met' if ratio <= TARGET else 'MISSED'}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
