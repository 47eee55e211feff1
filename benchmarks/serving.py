"""Measure tokens/s through tritonserver, in process, and of transformers' `generate`, in one run.

Every figure that is judged is a ratio of two measurements taken in turn, round by round, on the same threads.
    python -m benchmarks.serving [--rounds 3] [--tokens 128]
writes benchmarks/results/serving.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.sinks import Nobody
from benchmarks.weights import smollm2
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.engine.admission import Admission, RequestOptions
from deepseek_triton.ensemble.engine.loop import EngineLoop
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.engine.sequence import FailureKind, Request
from deepseek_triton.ensemble.protocol.progress import Update
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import SamplingParams
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
NAME = "bench"
MAX_SEQ_LEN = 1024
STREAMS = (1, 8)
# Counting goes on until max_tokens: every run generates the same number of tokens.
PROMPTS = [" ".join(str(n) for n in range(start, start + 12)) + " " for start in range(1, 81, 10)]
TARGETS = {
    "triton / in process, 1 stream": 0.85,
    "triton / in process, 8 streams": 0.85,
    "8 streams / 1 stream, triton": 2.5,
    "triton / transformers generate, 1 stream": 1.0,
}
Measure = Callable[[int], float]


class _Sink:
    """A sink that waits for the end of one request."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.num_tokens = 0

    def send(self, request: Request, updates: Sequence[Update]) -> None:
        self.num_tokens += sum(len(update.ids) for update in updates)
        if request.is_finished:
            self.done.set()

    def fail(self, message: str, kind: FailureKind) -> None:
        raise RuntimeError(message)

    def is_cancelled(self) -> bool:
        return False


def in_process(directory: Path, tokenizer: Tokenizer, settings: EngineSettings, num_tokens: int) -> Measure:
    """Run the engine's loop without Triton, tokenizer or detokenizer."""
    manifest, runner = load_runner(directory, settings)
    admission = Admission(directory, runner.vocab_size, manifest.end_ids, settings)
    loop = EngineLoop(runner, settings=settings, acknowledgements=Nobody())
    loop.start()
    prompts = [tokenizer.encode(prompt).astype(np.int64) for prompt in PROMPTS]

    def measure(streams: int) -> float:
        sinks = [_Sink() for _ in range(streams)]
        start = time.perf_counter()
        options = RequestOptions(SamplingParams(max_tokens=num_tokens), stream=True)
        for i, sink in enumerate(sinks):
            loop.submit(admission.make_request(i, str(i), prompts[i], options, sink, loop.clock()))
        for sink in sinks:
            sink.done.wait()
        return _rate([sink.num_tokens for sink in sinks], num_tokens, start)

    return measure


def through_triton(url: str, num_tokens: int) -> Measure:
    """Run streams over gRPC, text in and text out."""
    client = GrpcClient(url, NAME)

    def stream(i: int) -> int:
        chunks = list(client.stream(GenerateRequest(prompt=PROMPTS[i], max_tokens=num_tokens)))
        return chunks[-1].num_output_tokens

    def measure(streams: int) -> float:
        with ThreadPoolExecutor(streams) as pool:
            start = time.perf_counter()
            return _rate(list(pool.map(stream, range(streams))), num_tokens, start)

    return measure


def transformers_generate(checkpoint: Path, tokenizer: Tokenizer, threads: int, num_tokens: int) -> Measure:
    """Run transformers' greedy `generate` in float32 with the same prompt and number of tokens."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.float32
    )
    ids = torch.tensor(tokenizer.encode(PROMPTS[0]).astype(np.int64))[None]

    def measure(streams: int) -> float:
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
        return _rate([out.shape[1] - ids.shape[1]], num_tokens, start)

    return measure


def _rate(counts: list[int], num_tokens: int, start: float) -> float:
    seconds = time.perf_counter() - start
    if counts != [num_tokens] * len(counts):
        raise RuntimeError(f"expected {num_tokens} tokens a stream, got {counts}: the runs can't be compared")
    return sum(counts) / seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated by each stream")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    checkpoint = smollm2()
    threads = len(os.sched_getaffinity(0))
    chosen: dict[str, Any] = {"max_num_seqs": max(STREAMS), "num_threads": threads}
    settings = EngineSettings(**chosen)

    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        build(BuildOptions(checkpoint, NAME, repository, max_seq_len=MAX_SEQ_LEN, settings=chosen))
        engine = repository / f"{NAME}-engine" / "1"
        tokenizer = Tokenizer.from_directory(repository / f"{NAME}-tokenizer" / "1")
        with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
            measures: list[tuple[str, int, Measure]] = []
            local = in_process(engine, tokenizer, settings, arguments.tokens)
            remote = through_triton(server.grpc_url, arguments.tokens)
            for streams in STREAMS:
                measures += [("in process", streams, local), ("triton", streams, remote)]
            reference = transformers_generate(checkpoint, tokenizer, threads, arguments.tokens)
            measures.append(("transformers", 1, reference))
            rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name, n, _ in measures}
            for round_number in range(arguments.rounds + 1):  # the first warms up
                for name, streams, measure in measures:
                    rate = measure(streams)
                    print(f"round {round_number}: {name}, {streams} streams: {rate:.1f} tokens/s", flush=True)
                    if round_number:
                        rates[name, streams].append(rate)
    return _report(rates, arguments.tokens, threads)


def _report(rates: dict[tuple[str, int], list[float]], num_tokens: int, threads: int) -> int:
    def ratio(over: tuple[str, int], under: tuple[str, int]) -> float:
        return statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True))

    ratios = dict(
        zip(
            TARGETS,
            (
                ratio(("triton", 1), ("in process", 1)),
                ratio(("triton", 8), ("in process", 8)),
                ratio(("triton", 8), ("triton", 1)),
                ratio(("triton", 1), ("transformers", 1)),
            ),
            strict=True,
        )
    )
    result = {
        "machine": describe(),
        "model": "SmolLM2-135M-Instruct, float32",
        "threads": threads,
        "max_seq_len": MAX_SEQ_LEN,
        "tokens_per_stream": num_tokens,
        "tokens_per_s": {f"{name}, {n} streams": [round(r, 2) for r in values] for (name, n), values in rates.items()},
        "ratios": {name: {"median": round(value, 3), "target": TARGETS[name]} for name, value in ratios.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serving.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} (target {TARGETS[name]}) {'met' if value >= TARGETS[name] else 'MISSED'}")
    return 0 if all(value >= TARGETS[name] for name, value in ratios.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
