"""How long a served scoring model takes for batches of texts, from the client's call to the labels.

One client sends requests of several texts at a fixed rate, whatever the answers take, as payments come that somebody
else has collected; a latency begins when its request was due. Then as many clients as a batch has texts send one text
each, as fast as they are answered: Triton's dynamic batcher makes the batches.
    python -m benchmarks.scoring_batches REPOSITORY NAME [--texts 16] [--words 40] [--rate 8] [--output F]
REPOSITORY holds a built scoring model NAME of any target with default labels; the figures go to F, as JSON.
On a GPU, the 7B's shape with random weights, whose tokens are bytes:
    python -m benchmarks.fp8_build_gpu make 7b WORK
    deepseek-triton build WORK/7b-28 --name judge --target cuda --recipe fast --task score --labels yes,no
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import ScoreRequest
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.loadtest.prompts import WHAT, WHO

LEVEL_MS = 120  # the fraud example's
WARM_UP = 20  # requests before any is measured


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, measure, print, and write; 1 if the batches' 99th percentile is above LEVEL_MS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("--texts", type=int, default=16, help="texts of a batch (default: %(default)s)")
    parser.add_argument("--words", type=int, default=40, help="words of a text (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=8, help="batches a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file for the figures")
    arguments = parser.parse_args(argv)
    engine = arguments.repository / f"{arguments.name}-engine"
    manifest = Manifest.load(max(engine.glob("[0-9]*"), key=lambda path: int(path.name)))
    with TritonServer(arguments.repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        batches, num_tokens = _batches(server.grpc_url, arguments)
        singles = _singles(server.grpc_url, arguments)
    result = {
        "machine": describe(),
        "model": {"target": manifest.target, "precision": manifest.precision, "spec": manifest.spec},
        "texts": arguments.texts,
        "tokens of a text": num_tokens,
        f"batches of {arguments.texts}, {arguments.rate:g} a second": batches,
        f"{arguments.texts} clients of one text": singles,
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if batches["p99_ms"] <= LEVEL_MS else 1


def _batches(url: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Latencies of requests that are due at a fixed rate, and the tokens of a text on average."""
    count = max(1, round(arguments.rate * arguments.seconds))
    latencies: list[float] = []
    num_tokens: list[int] = []
    with GrpcClient(url, arguments.name) as client:
        for number in range(WARM_UP):
            client.score(_request(arguments, -1 - number))
        start = time.perf_counter()
        threads = []

        def ask(number: int, due: float) -> None:
            scores = client.score(_request(arguments, number))
            latencies.append(time.perf_counter() - due)
            num_tokens.extend(score.num_input_tokens for score in scores)

        for number in range(count):
            due = start + number / arguments.rate
            time.sleep(max(0.0, due - time.perf_counter()))
            threads.append(threading.Thread(target=ask, args=(number, due)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    if len(latencies) != count:
        raise RuntimeError(f"{count - len(latencies)} of {count} requests failed")
    return _percentiles(latencies), float(np.mean(num_tokens))


def _singles(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Latencies of clients that ask again as soon as they are answered, and how many texts are answered a second."""
    latencies: list[float] = []
    end = time.perf_counter() + arguments.seconds

    def ask(client_number: int) -> None:
        with GrpcClient(url, arguments.name) as client:
            number = client_number * 1_000_000
            while (begun := time.perf_counter()) < end:
                client.score(ScoreRequest(_text(number, arguments.words)))
                latencies.append(time.perf_counter() - begun)
                number += 1

    threads = [threading.Thread(target=ask, args=(number + 1,)) for number in range(arguments.texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {**_percentiles(latencies), "texts_per_s": round(len(latencies) / arguments.seconds, 1)}


def _request(arguments: argparse.Namespace, number: int) -> ScoreRequest:
    return ScoreRequest([_text(number * arguments.texts + index, arguments.words) for index in range(arguments.texts)])


def _text(number: int, num_words: int) -> str:
    """A text that no other number has."""
    words = " ".join(f"{WHO[number % len(WHO)]} paid for {thing}" for thing in WHAT * (1 + num_words // 30)).split()
    return " ".join([str(number), *words][:num_words])


def _percentiles(latencies: Sequence[float]) -> dict[str, Any]:
    found = np.percentile(np.array(latencies) * 1e3, [50, 90, 99])
    return {"requests": len(latencies)} | {
        f"p{share}_ms": round(float(value), 2) for share, value in zip((50, 90, 99), found, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
