"""Measure the overhead of the engine's loop: requests through the loop, and the same on the runner alone.

The runner takes the times that the cuda runner took (one stream: V2-Lite's shape on an H200, the shortest; else the
7B's on an H100) and computes nothing, so any machine can measure whether the loop keeps it busy. Each response takes
the loop's thread as long as one of Triton's.
    python -m benchmarks.loop_pace
measures one and two steps in flight, writes benchmarks/results/loop-pace.json; the status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.paced_runner import PacedRunner
from benchmarks.sinks import EndedSink, Nobody
from deepseek_triton.ensemble.engine.loop import EngineLoop
from deepseek_triton.ensemble.engine.runners.base import LAST_TOKEN, DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence
from deepseek_triton.ensemble.protocol.progress import Update
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampler, SamplingParams

RESULTS = Path(__file__).parent / "results"
PROMPT, ANSWER = 512, 128  # tokens
VOCAB_SIZE, MAX_SEQ_LEN = 152064, 4096
CHUNK = 4096
STEP_S = {1: 0.89e-3, 64: 5.2e-3, 128: 6.3e-3}  # rows → a decode's seconds
PROMPT_TOKEN_S = 13e-6
SEND_S = 1e-4  # time of the loop's thread for each response
MAX_BETWEEN_TOKENS = 1.05  # times the runner's own, one stream
MIN_TOKENS_PER_S = 0.9  # times the runner's own, 64 and 128 streams
GREEDY = DeviceSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0)
ROUNDS = 3


class Sink(EndedSink):
    """A sink that takes as long as a response to Triton, and signals when its request is done."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def send(self, request: Request, updates: Sequence[Update]) -> None:
        """See Sink."""
        now = time.perf_counter()
        while time.perf_counter() < now + SEND_S:
            pass
        self.times += [now] * sum(len(update.ids) for update in updates)
        if request.is_finished:
            self.done.set()


def alone(runner: PacedRunner, num_requests: int) -> tuple[float, float]:
    """Seconds for all requests and between two tokens, of the runner alone, driven as in decode_gpu.py."""
    prompt = np.zeros(PROMPT, np.int64)
    at_once = CHUNK // PROMPT
    began = time.perf_counter()
    for first in range(0, num_requests, at_once):
        slots = range(first, min(first + at_once, num_requests))
        runner.start_prefill([PromptChunk(slot, prompt, 0) for slot in slots], [GREEDY] * len(slots), [])
        runner.finish_prefill()
    decoding = time.perf_counter()
    for step in range(ANSWER - 1):
        ids = np.full(num_requests, LAST_TOKEN)
        runner.start_decode(ids, np.full(num_requests, PROMPT + step), [GREEDY] * num_requests, [])
        if step:
            runner.finish_decode()
    runner.finish_decode()
    now = time.perf_counter()
    return now - began, (now - decoding) / (ANSWER - 1)


def through_loop(loop: EngineLoop, num_requests: int, number: int) -> tuple[float, float]:
    """The same figures through the loop, for requests that all arrive at once, as their clients measure them."""
    params = SamplingParams(max_tokens=ANSWER)
    sinks = [Sink() for _ in range(num_requests)]
    began = time.perf_counter()
    for index, sink in enumerate(sinks):
        prompt = np.full(PROMPT, number * num_requests + index)
        request = Request(number * num_requests + index, "", prompt, params, sink, is_streamed=True)
        request.arrived_at = loop.clock()
        request.sequences.append(TokenSequence(request, 0, Sampler(params)))
        loop.submit(request)
    for sink in sinks:
        sink.done.wait()
        if sink.error is not None or len(sink.times) != ANSWER:
            raise RuntimeError(f"a request ended with {len(sink.times)} tokens: {sink.error}")
    seconds = time.perf_counter() - began
    return seconds, statistics.median((sink.times[-1] - sink.times[0]) / (ANSWER - 1) for sink in sinks)


def measure(num_requests: int, steps_in_flight: int) -> dict[str, float]:
    """Medians of tokens/s and of ms between tokens, of the runner alone and through the loop."""

    def runner() -> PacedRunner:
        step_s = STEP_S[num_requests]
        return PacedRunner(num_requests, MAX_SEQ_LEN, VOCAB_SIZE, step_s, PROMPT_TOKEN_S, steps_in_flight)

    settings = EngineSettings(
        max_num_seqs=num_requests,
        max_num_batched_tokens=CHUNK,
        max_prefill_stall=20.0,
        prefix_reuse="off",
        cancel_after_s=60.0,
    )
    loop = EngineLoop(runner(), settings=settings, acknowledgements=Nobody())
    loop.start()
    own = [alone(runner(), num_requests) for _ in range(ROUNDS)]
    # The first rounds are warm-up: the prefill budget adapts to the runner.
    found = [through_loop(loop, num_requests, number) for number in range(ROUNDS + 2)][2:]
    loop.close()
    figures = {}
    for name, rounds in (("runner", own), ("loop", found)):
        seconds, between = (statistics.median(column) for column in zip(*rounds, strict=True))
        figures[f"{name}_tokens_per_s"] = round(num_requests * ANSWER / seconds)
        figures[f"{name}_ms_between_tokens"] = round(between * 1e3, 3)
    figures["tokens_per_s_ratio"] = round(figures["loop_tokens_per_s"] / figures["runner_tokens_per_s"], 3)
    figures["between_tokens_ratio"] = round(figures["loop_ms_between_tokens"] / figures["runner_ms_between_tokens"], 3)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args(argv)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for steps_in_flight in (1, 2):
        rows = found[f"{steps_in_flight} in flight"] = {}
        for num_requests in STEP_S:
            rows[num_requests] = measure(num_requests, steps_in_flight)
            print(f"{steps_in_flight} in flight, {num_requests} streams: {rows[num_requests]}", flush=True)
    is_met = all(
        row["between_tokens_ratio"] <= MAX_BETWEEN_TOKENS if n == 1 else row["tokens_per_s_ratio"] >= MIN_TOKENS_PER_S
        for n, row in found["2 in flight"].items()
    )
    result: dict[str, Any] = {"machine": describe(), "send_ms": SEND_S * 1e3, **found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loop-pace.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
