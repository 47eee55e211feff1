"""What dynamic batching brings a scoring model, and what it costs: two servers on the same weights, in turn.

One server's engine has Triton's dynamic batcher, the other's has none; rounds alternate, and every figure that is
judged is a ratio or difference of one run. Batch sizes and queue times are Triton's own statistics.
    python -m benchmarks.scoring [--rounds 3] [--seconds 6]
writes benchmarks/results/scoring.json and prints the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from builders.commands.tune_load import Load, run
from builders.options import BuildOptions
from builders.pbtxt import parse_text, to_text
from builders.repository import build
from builders.scoring_options import ScoringOptions
from clients.base import BaseClient
from clients.grpc import GrpcClient
from clients.score import Score, ScoreRequest
from ensemble import contract
from ensemble.server import TritonServer

RESULTS = Path(__file__).parent / "results"
NAME = "scoring"
ENGINE = f"{NAME}-engine"
LABELS = ("positive", "negative")
TEMPLATE = "Review: {text}\nSentiment:"
CLIENTS = 16
WORDS = (
    "the film was slow but honest and I liked how quietly it ended while we expected much more noise from such a loud "
    "director whose earlier work bored everyone in our row of seats on a cold evening last week"
)
# name → words in a text, fewest and most
WORKLOADS = {"short": (2, 8), "medium": (8, 24), "long": (40, 80)}
JUDGED = "short"
TARGETS = {
    "requests/s, batched / one by one, 16 clients": ("at least", 1.8),
    "mean executed batch size, 16 clients": ("at least", 2.0),
    "added queue time at one client, ms": ("at most", None),  # the configured delay
    "preprocessing a request, median ms": ("at most", 8.0),
}


def make_texts(count: int, fewest: int, most: int) -> list[str]:
    """Texts of ragged lengths; always the same."""
    random = np.random.default_rng(7)
    return [" ".join(random.choice(WORDS.split(), random.integers(fewest, most + 1))) for _ in range(count)]


def ask(client: BaseClient, text: str) -> tuple[Score, ...]:
    """One request of one text."""
    return client.score(ScoreRequest(texts=[text]))


class Engine:
    """Triton's counters of a server's engine."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server

    def read(self) -> dict[str, float]:
        """Requests, executions, and nanoseconds in the queue, since the server started."""
        url = f"{self._server.http_url}/v2/models/{ENGINE}/stats"
        request = urllib.request.Request(url, headers=self._server.admin_headers)
        with urllib.request.urlopen(request) as response:
            (stats,) = json.load(response)["model_stats"]
        return {
            "requests": stats["inference_count"],
            "executions": stats["execution_count"],
            "queue_ns": stats["inference_stats"]["queue"]["ns"],
        }

    def during(self, before: dict[str, float]) -> dict[str, float]:
        """What has been added since `before`."""
        return {name: value - before[name] for name, value in self.read().items()}


def without_batcher(repository: Path, copy: Path) -> None:
    """A copy of the repository, sharing its files, whose engine takes one request at a time."""
    shutil.copytree(repository, copy, copy_function=os.link)
    path = copy / ENGINE / "config.pbtxt"
    config = parse_text(path.read_text(), path)
    config.ClearField("dynamic_batching")
    path.unlink()  # a link: the original must not change
    path.write_text(to_text(config))


def preprocessing_ms(client: BaseClient, texts: Sequence[str]) -> list[float]:
    """A call of the tokenizer by itself, there and back, in ms each."""
    times = []
    for text in texts:
        start = time.perf_counter()
        client.infer(f"{NAME}-tokenizer", ScoreRequest(texts=[text]).to_tensors(), contract.SCORE_TOKENIZER.outputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of load in each round")
    arguments = parser.parse_args(argv)
    scoring = ScoringOptions(template=TEMPLATE, labels=LABELS)
    workloads = {name: make_texts(256, *words) for name, words in WORKLOADS.items()}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        repository = Path(directory) / "batched"
        build(BuildOptions(smollm2(), NAME, repository, task="score", max_seq_len=512, scoring=scoring))
        without_batcher(repository, Path(directory) / "single")
        servers = {
            name: stack.enter_context(TritonServer(Path(directory) / name, http_port=0, grpc_port=0, metrics_port=0))
            for name in ("batched", "single")
        }
        rates: dict[tuple[str, str], list[float]] = {(w, s): [] for w in workloads for s in servers}
        p99_ms: dict[tuple[str, str], list[float]] = {key: [] for key in rates}
        batch_sizes: dict[str, list[float]] = {workload: [] for workload in workloads}
        queue_ms: dict[str, list[float]] = {name: [] for name in servers}
        for round_number in range(arguments.rounds + 1):  # the first warms up
            seconds = arguments.seconds if round_number else arguments.seconds / 2
            for workload, texts in workloads.items():
                for name, server in servers.items():
                    engine = Engine(server)
                    before = engine.read()
                    found = run(Load(texts, CLIENTS, seconds, ask), server.grpc_url, NAME)
                    counted = engine.during(before)
                    if found.failure and round_number:
                        raise RuntimeError(found.failure)
                    print(f"round {round_number}: {workload}, {name}: {found.throughput:.1f} requests/s", flush=True)
                    if round_number:
                        rates[workload, name].append(found.throughput)
                        p99_ms[workload, name].append(found.p99_ms)
                        if name == "batched":
                            batch_sizes[workload].append(counted["requests"] / counted["executions"])
            for name, server in servers.items():
                engine = Engine(server)
                before = engine.read()
                run(Load(workloads[JUDGED], 1, seconds / 2, ask), server.grpc_url, NAME)
                counted = engine.during(before)
                if round_number:
                    queue_ms[name].append(counted["queue_ns"] / counted["requests"] / 1e6)
        with GrpcClient(servers["batched"].grpc_url, NAME) as client:
            preprocessing = preprocessing_ms(client, workloads["long"])

    delay_ms = scoring.batching.max_queue_delay_us / 1e3
    pairs = zip(rates[JUDGED, "batched"], rates[JUDGED, "single"], strict=True)
    added = (one - other for one, other in zip(queue_ms["batched"], queue_ms["single"], strict=True))
    values = (
        statistics.median(batched / single for batched, single in pairs),
        statistics.median(batch_sizes[JUDGED]),
        statistics.median(added),
        statistics.median(preprocessing),
    )
    figures = {}
    for (name, (kind, target)), value in zip(TARGETS.items(), values, strict=True):
        limit = delay_ms if target is None else target
        is_met = value >= limit if kind == "at least" else value <= limit
        figures[name] = {"value": round(value, 3), "target": f"{kind} {limit:g}", "met": is_met}
        print(f"{name}: {value:.3f} ({kind} {limit:g}) {'met' if is_met else 'MISSED'}")
    result = {
        "machine": describe(),
        "model": "SmolLM2-135M-Instruct, float32",
        "template": TEMPLATE,
        "clients": CLIENTS,
        "max_batch_size": scoring.batching.max_batch_size,
        "max_queue_delay_us": scoring.batching.max_queue_delay_us,
        "words_in_a_text": WORKLOADS,
        "figures": figures,
        "requests_per_s": {f"{w}, {s}": [round(r, 2) for r in values] for (w, s), values in rates.items()},
        "p99_ms": {f"{w}, {s}": [round(r, 1) for r in values] for (w, s), values in p99_ms.items()},
        "mean_batch_size": {workload: [round(size, 2) for size in sizes] for workload, sizes in batch_sizes.items()},
        "queue_ms_at_one_client": {name: [round(ms, 3) for ms in values] for name, values in queue_ms.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scoring.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(figure["met"] for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
