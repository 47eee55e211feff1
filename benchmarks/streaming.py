"""Measure Triton's overhead for streams: many streams through the real server, from a runner that computes nothing.

The runner takes a fixed time for each step. Every response crosses four processes; tokens that are ready together
travel together when the consumer lags, so the cost of a response doesn't bound the tokens.
    python -m benchmarks.streaming [--streams 64] [--step-ms 1] [--tokens 1500]
writes benchmarks/results/streaming.json; the status is 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.server.tritonserver import TritonServer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NAME = "paced"
MAX_SEQ_LEN = 2048
TARGET = 20_000  # tokens/s at 64 streams and 1 ms a step
ROUNDS = 3
MODEL = """\
from benchmarks.paced_runner import PacedRunner
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.models import engine


def load(directory, settings):
    manifest = Manifest.load(directory)
    vocab_size = manifest.spec["vocab_size"]
    return manifest, PacedRunner(settings.max_num_seqs, manifest.max_seq_len, vocab_size, {step_s})


assert hasattr(engine, "load_model")  # what takes its place must be what is called
engine.load_model = load
TritonPythonModel = engine.TritonPythonModel
"""


def write_repository(repository: Path, max_num_seqs: int, step_s: float) -> None:
    """Write the demo model's repository with another runner in its engine."""
    settings = {"max_num_seqs": max_num_seqs}
    build(BuildOptions(smollm2(), NAME, repository, max_seq_len=MAX_SEQ_LEN, settings=settings))
    engine = repository / f"{NAME}-engine" / "1"
    (engine / "model.py").write_text(MODEL.format(step_s=step_s))


async def one_stream(stub: service_pb2_grpc.GRPCInferenceServiceStub, num_tokens: int) -> tuple[int, int]:
    """Tokens and responses of one stream. It uses the generated stub, so that no client is measured."""
    request = service_pb2.ModelInferRequest(model_name=NAME)
    for name, datatype, value in (
        ("text_input", "BYTES", struct.pack("<I", 3) + b"One"),
        ("max_tokens", "INT32", struct.pack("<i", num_tokens)),
        ("stream", "BOOL", b"\1"),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=(1, 1))
        request.raw_input_contents.append(value)
    request.outputs.add(name="num_output_tokens")
    count = responses = 0
    async for response in stub.ModelStreamInfer(iter([request]), timeout=120):
        if response.error_message:
            raise RuntimeError(response.error_message)
        count += struct.unpack("<i", response.infer_response.raw_output_contents[0])[0]
        responses += 1
    if count != num_tokens:
        raise RuntimeError(f"a stream ended after {count} of {num_tokens} tokens")
    return count, responses


async def measure(url: str, streams: int, num_tokens: int) -> list[dict[str, float]]:
    """A few rounds, the first to warm up."""
    async with grpc.aio.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        rounds = []
        for number in range(ROUNDS + 1):
            start = time.perf_counter()
            counts = await asyncio.gather(*(one_stream(stub, num_tokens) for _ in range(streams)))
            seconds = time.perf_counter() - start
            tokens, responses = (sum(column) for column in zip(*counts, strict=True))
            figures = {"tokens_per_s": tokens / seconds, "responses_per_s": responses / seconds}
            print(f"round {number}: " + ", ".join(f"{name} {value:.0f}" for name, value in figures.items()), flush=True)
            if number:
                rounds.append(figures)
    return rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of each stream")
    arguments = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    directory = Path(tempfile.mkdtemp())
    try:
        write_repository(directory / "models", arguments.streams, arguments.step_ms / 1e3)
        with TritonServer(directory / "models", http_port=0, grpc_port=0, metrics_port=0) as server:
            rounds = asyncio.run(measure(server.grpc_url, arguments.streams, arguments.tokens))
    finally:
        shutil.rmtree(directory)
    rate = statistics.median(figures["tokens_per_s"] for figures in rounds)
    result = {
        "machine": describe(),
        "streams": arguments.streams,
        "step_ms": arguments.step_ms,
        "tokens_per_stream": arguments.tokens,
        "rounds": [{name: round(value) for name, value in figures.items()} for figures in rounds],
        "tokens_per_s": {"median": round(rate), "target": TARGET},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"tokens/s: {rate:.0f} (target {TARGET}) {'met' if rate >= TARGET else 'MISSED'}")
    return 0 if rate >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
