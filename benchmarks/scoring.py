"""Measure the gain and cost of dynamic batching for a scoring model: servers on the same weights, in turn.

One server's engine has Triton's dynamic batcher, another's has none; two more have two engine instances of half the
cores each. Rounds alternate, and every figure that is judged is a ratio or difference of one run. Batch sizes and queue
times are Triton's own statistics. The GFLOP of a request and the processor's rate for large matrix products stand
beside the requests/s: their quotient is the upper limit for any batching.
    python -m benchmarks.scoring [--rounds 3] [--seconds 3.5]
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fraud import FEW_SHOT_EXAMPLES, ZERO_SHOT, few_shot
from benchmarks.machine import describe
from benchmarks.payments import LABELS as FRAUD_LABELS
from benchmarks.payments import make_payments
from benchmarks.weights import smollm2
from deepseek_triton.builders.commands import tune_load
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.pbtxt import parse_text, to_text
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import Score, ScoreRequest
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from deepseek_triton.ensemble.scoring.prompts import Prompter
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAME = "scoring"
ENGINE = f"{NAME}-engine"
LABELS = ("positive", "negative")
TEMPLATE = "Review: {text}\nSentiment:"
CLIENTS = 16
MAX_SEQ_LEN = 1024
QUEUE_REQUESTS = 100
WORDS = (
    "the film was slow but honest and I liked how quietly it ended while we expected much more noise from such a loud "
    "director whose earlier work bored everyone in our row of seats on a cold evening last week"
)
BATCHING = "requests/s, batched / one by one, 16 clients"
TARGET = 1.8
PLAIN = {"batched": (True, 1), "single": (False, 1)}  # server → has it a batcher, how many engine instances
DOUBLED = {"batched, 2 instances": (True, 2), "single, 2 instances": (False, 2)}


@dataclass(frozen=True)
class Workload:
    """Texts, and the template and labels that they are scored with; servers: as PLAIN."""

    template: str
    labels: tuple[str, ...]
    texts: Mapping[str, Sequence[str]]
    servers: Mapping[str, tuple[bool, int]] = field(default_factory=lambda: PLAIN)


def make_texts(count: int, fewest: int, most: int) -> list[str]:
    """Texts of `fewest` to `most` words; always the same."""
    random = np.random.default_rng(7)
    return [" ".join(random.choice(WORDS.split(), random.integers(fewest, most + 1))) for _ in range(count)]


def make_workloads() -> list[Workload]:
    """Random words in three lengths, reviews as people write them (3 to 111 words), and the fraud example's records."""
    reviews = (HERE / "data" / "reviews.txt").read_text(encoding="utf-8").splitlines()
    payments = make_payments(64, 1)
    records = [payment.text() for payment in payments[FEW_SHOT_EXAMPLES:]]
    return [
        Workload(
            TEMPLATE,
            LABELS,
            {
                "short (2-8 words)": make_texts(256, 2, 8),
                "medium (8-24 words)": make_texts(256, 8, 24),
                "long (40-80 words)": make_texts(256, 40, 80),
                "reviews": reviews,
            },
            PLAIN | DOUBLED,
        ),
        Workload(ZERO_SHOT, FRAUD_LABELS, {"fraud, zero-shot": records}),
        Workload(few_shot(payments[:FEW_SHOT_EXAMPLES]), FRAUD_LABELS, {"fraud, few-shot": records}),
    ]


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


def with_engine(repository: Path, copy: Path, *, has_batcher: bool, instances: int) -> None:
    """A copy of the repository, sharing its files, with another engine configuration."""
    shutil.copytree(repository, copy, copy_function=os.link)
    path = copy / ENGINE / "config.pbtxt"
    config = parse_text(path.read_text(), path)
    if not has_batcher:
        config.ClearField("dynamic_batching")
    config.instance_group[0].count = instances
    path.unlink()  # a link: the original must not change
    path.write_text(to_text(config))


def queue_ms(server: TritonServer, texts: Sequence[str]) -> list[float]:
    """Milliseconds that each of some requests waited for the engine, with one client."""
    engine, times = Engine(server), []
    with GrpcClient(server.grpc_url, NAME) as client:
        for text in texts:
            before = engine.read()
            ask(client, text)
            times.append(engine.during(before)["queue_ns"] / 1e6)
    return times


def preprocessing_ms(client: BaseClient, texts: Sequence[str]) -> list[float]:
    """Milliseconds of each call of the tokenizer alone, from a client."""
    times = []
    for text in texts:
        start = time.perf_counter()
        client.infer(f"{NAME}-tokenizer", ScoreRequest(texts=[text]).to_tensors(), contract.SCORE_TOKENIZER.outputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def matmul_gflops() -> float:
    """GFLOP/s of ONNX Runtime on this machine, for a large product of the model's own width."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rows, width, columns = 512, 576, 1536
    weight = numpy_helper.from_array(np.ones((width, columns), np.float32), "w")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, c]) for n, c in (("x", width), ("y", columns))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds, times = {"x": np.ones((rows, width), np.float32)}, []
    for _ in range(100):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * columns / statistics.median(times) / 1e9


def work_of(repository: Path, workload: Workload, texts: Sequence[str]) -> dict[str, float]:
    """Averages of a request: tokens of its prompt, computed tokens, and GFLOP of its matrix products."""
    tokenizer, version = repository / f"{NAME}-tokenizer" / "1", repository / ENGINE / "1"
    prompter = Prompter(ScoringProfile.load(tokenizer), Tokenizer.from_directory(tokenizer))
    manifest = Manifest.load(version)
    spec, prefix = manifest.spec, np.array(manifest.engine.get("prefix_ids", ()), np.int32)
    rows = [prompter.row(text, None, workload.labels) for text in texts]
    computed = [len(row) - len(prefix) * row.begins_with(prefix) for row, _, _ in rows]
    hidden, heads = spec["hidden_size"], (2 * spec["num_heads"] + 2 * spec["num_kv_heads"]) * spec["head_dim"]
    weights = spec["num_layers"] * hidden * (heads + 3 * spec["intermediate_size"])
    head = spec["vocab_size"] * hidden * statistics.mean(len(row.logit_positions) for row, _, _ in rows)
    return {
        "prompt_tokens": statistics.mean(num_tokens for _, _, num_tokens in rows),
        "computed_tokens": statistics.mean(computed),
        "gflop": 2 * (weights * statistics.mean(computed) + head) / 1e9,
    }


@dataclass
class Load:
    """The figures of one server with one kind of text, one value for each round."""

    requests_per_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    batch_size: list[float] = field(default_factory=list)


@dataclass
class Found:
    """All measurements."""

    loads: dict[str, dict[str, Load]] = field(default_factory=dict)  # kind of text → server → Load
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    queue_ms: dict[str, list[float]] = field(default_factory=dict)
    preprocessing_ms: list[float] = field(default_factory=list)


def measure(workload: Workload, found: Found, rounds: int, seconds: float, *, is_first: bool) -> None:
    """Build, serve and load; the first workload also measures queue times and the tokenizer."""
    scoring = ScoringOptions(template=workload.template, labels=workload.labels)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        repository = Path(directory) / "built"
        build(BuildOptions(smollm2(), NAME, repository, task="score", max_seq_len=MAX_SEQ_LEN, scoring=scoring))
        servers = {}
        for name, (has_batcher, instances) in workload.servers.items():
            models = Path(directory) / f"{'batched' if has_batcher else 'single'}-{instances}"
            with_engine(repository, models, has_batcher=has_batcher, instances=instances)
            server = TritonServer(models, http_port=0, grpc_port=0, metrics_port=0)
            servers[name] = stack.enter_context(server)
        for kind, texts in workload.texts.items():
            found.work[kind] = work_of(repository, workload, texts)
            found.loads[kind] = {name: Load() for name in servers}
        for number in range(rounds + 1):  # the first warms up
            for kind, texts in workload.texts.items():
                for name, server in servers.items():
                    engine = Engine(server)
                    before = engine.read()
                    load = tune_load.TuneLoad(texts, CLIENTS, seconds if number else seconds / 2, ask)
                    result = tune_load.run(load, server.grpc_url, NAME)
                    counted = engine.during(before)
                    if result.failure:
                        raise RuntimeError(result.failure)
                    print(f"round {number}: {kind}, {name}: {result.throughput:.1f} requests/s", flush=True)
                    if number:
                        own = found.loads[kind][name]
                        own.requests_per_s.append(result.throughput)
                        own.p99_ms.append(result.p99_ms)
                        own.batch_size.append(counted["requests"] / counted["executions"])
        if is_first:
            texts = next(iter(workload.texts.values()))[:QUEUE_REQUESTS]
            found.queue_ms = {name: queue_ms(servers[name], texts) for name in PLAIN}
            with GrpcClient(servers["batched"].grpc_url, NAME) as client:
                found.preprocessing_ms = preprocessing_ms(client, workload.texts["reviews"])


def figures_of(found: Found, peak: float) -> dict[str, dict[str, Any]]:
    """Every figure that has a target, and for a ratio the limit of this processor."""
    delay_ms = ScoringOptions().batching.max_queue_delay_us / 1e3
    figures: dict[str, dict[str, Any]] = {}

    def judge(name: str, value: float, kind: str, limit: float, **more: float) -> None:
        is_met = value >= limit if kind == "at least" else value <= limit
        figures[name] = {"value": round(value, 3), "target": f"{kind} {limit:g}", "met": is_met, **more}

    for kind, loads in found.loads.items():
        batched, single = loads["batched"].requests_per_s, loads["single"].requests_per_s
        ratio = statistics.median(one / other for one, other in zip(batched, single, strict=True))
        room = peak / (statistics.median(single) * found.work[kind]["gflop"])
        judge(f"{BATCHING}, {kind}", ratio, "at least", TARGET, at_matmul_speed=round(room, 2))
    kinds = [loads["batched"].batch_size for loads in found.loads.values()]
    judge("mean executed batch size, 16 clients, lowest", min(map(statistics.median, kinds)), "at least", 2.0)
    waited, unbatched = found.queue_ms["batched"], found.queue_ms["single"]
    added = statistics.median(waited) - statistics.median(unbatched)
    judge("added queue time at one client, median ms", added, "at most", delay_ms)
    judge("queue time at one client, 95 of 100 requests, ms", float(np.percentile(waited, 95)), "at most", delay_ms)
    judge("preprocessing a review, median ms", statistics.median(found.preprocessing_ms), "at most", 8.0)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.5, help="of load in each round")
    arguments = parser.parse_args(argv)
    found, peak = Found(), matmul_gflops()
    for number, workload in enumerate(make_workloads()):
        measure(workload, found, arguments.rounds, arguments.seconds, is_first=number == 0)
    peak = max(peak, matmul_gflops())
    figures = figures_of(found, peak)
    for name, figure in figures.items():
        verdict = "met" if figure["met"] else "MISSED"
        room = f"; at matmul speed {figure['at_matmul_speed']:.2f}" if "at_matmul_speed" in figure else ""
        print(f"{name}: {figure['value']:.3f} ({figure['target']}) {verdict}{room}")
    batching = ScoringOptions().batching
    result = {
        "machine": describe(),
        "model": "SmolLM2-135M-Instruct, float32",
        "template": TEMPLATE,
        "clients": CLIENTS,
        "max_batch_size": batching.max_batch_size,
        "max_queue_delay_us": batching.max_queue_delay_us,
        "matmul_gflops": round(peak, 1),
        "figures": figures,
        "loads": {
            kind: {
                **{name: round(value, 2) for name, value in found.work[kind].items()},
                **{name: told(own, found.work[kind]["gflop"]) for name, own in loads.items()},
            }
            for kind, loads in found.loads.items()
        },
        "queue_ms_at_one_client": {
            name: {f"p{share}": round(float(np.percentile(times, share)), 3) for share in (50, 95, 99)}
            for name, times in found.queue_ms.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scoring.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(figure["met"] for figure in figures.values()) else 1


def told(own: Load, gflop: float) -> dict[str, Any]:
    """A Load for the file."""
    return {
        "requests_per_s": [round(rate, 2) for rate in own.requests_per_s],
        "p99_ms": [round(ms, 1) for ms in own.p99_ms],
        "mean_batch_size": [round(size, 2) for size in own.batch_size],
        "gflops": round(statistics.median(own.requests_per_s) * gflop, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
