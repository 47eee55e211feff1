"""Measure long and many contexts on one or more GPUs: python -m benchmarks.pages_gpu

DeepSeek-R1-Distill-Qwen-7B's shape, FP8, random weights, greedy, nothing ends early. Three workloads, through the
engine's loop on the cuda runner, and with --peer vllm through vLLM's engine (in this process):
    mixed    256 requests at once, 2,000 tokens on average and up to 30,000, half of them prompt: tokens/s
    long     one prompt of 32,768 tokens: first token
    shared   64 requests with the same first 4,000 tokens, new to the server: median first token
Writes benchmarks/results/pages-gpu.json; what others wrote there is kept. --short takes an eighth of the requests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.sinks import EndedSink, Nobody
from deepseek_triton.ensemble.engine.loop import EngineLoop
from deepseek_triton.ensemble.engine.runners.base import Runner
from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence
from deepseek_triton.ensemble.protocol.progress import Update
from deepseek_triton.ensemble.protocol.settings import KV_CACHES, EngineSettings
from deepseek_triton.ensemble.sampling import Sampler, SamplingParams

RESULTS = Path(__file__).parent / "results"
MAX_SEQ_LEN, MAX_NUM_SEQS, CHUNK = 33_024, 256, 8192
WARM_UP = 32  # tokens of an answer
VOCAB_SIZE = 150_000  # ids below this


@dataclass(frozen=True)
class Wanted:
    """A request: its prompt and the number of its output tokens."""

    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Served:
    """What came: seconds to each request's first token and for all, output tokens."""

    first_s: list[float]
    total_s: float
    num_tokens: int


Serve = Callable[[list[Wanted]], Served]


def workloads(share: int, seed: int) -> dict[str, list[Wanted]]:
    """The workloads by name, with every `share`-th request; other seeds have other tokens and the same lengths."""
    lengths = np.random.default_rng(7).lognormal(0.0, 1.1, 256)
    lengths = np.clip(lengths * 2000 / lengths.mean(), 32, 30_000).astype(int)[::share]
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        found: list[int] = random.integers(1, VOCAB_SIZE, count).tolist()
        return found

    prefix = ids(4000)
    return {
        "mixed": [Wanted(ids(n // 2), int(n - n // 2)) for n in lengths],
        "long": [Wanted(ids(32_768), 1)],
        "shared": [Wanted([*prefix, *ids(64)], 32) for _ in range(64 // share)],
    }


def measure(serve: Serve, share: int) -> dict[str, Any]:
    """Each workload after one with other tokens and short answers, which warms up."""
    found: dict[str, Any] = {}
    for name in workloads(share, 0):
        serve([replace(one, num_tokens=min(one.num_tokens, WARM_UP)) for one in workloads(share, 1)[name]])
        wanted = workloads(share, 2)[name]
        served = serve(wanted)
        if served.num_tokens != sum(one.num_tokens for one in wanted):
            raise RuntimeError(f"{name}: {served.num_tokens} tokens came")
        found[name] = {
            "requests": len(wanted),
            "tokens_per_s": round(served.num_tokens / served.total_s),
            "first_token_median_ms": round(statistics.median(served.first_s) * 1e3, 1),
            "first_token_worst_ms": round(max(served.first_s) * 1e3, 1),
            "total_s": round(served.total_s, 2),
        }
        print(name, found[name], flush=True)
    return found


class Sink(EndedSink):
    """Notes when the first token came, and signals when the request is done."""

    def __init__(self) -> None:
        super().__init__()
        self.first_at = 0.0
        self.num_tokens = 0

    def send(self, request: Request, updates: Sequence[Update]) -> None:
        """See Sink."""
        self.first_at = self.first_at or time.perf_counter()
        self.num_tokens += sum(len(update.ids) for update in updates)
        if request.is_finished:
            self.done.set()


class OurEngine:
    """Serves through the engine's loop on `runner`."""

    def __init__(self, runner: Runner) -> None:
        settings = EngineSettings(
            max_num_seqs=runner.max_num_seqs, max_num_batched_tokens=CHUNK, max_prefill_stall=10.0, cancel_after_s=600.0
        )
        self.loop = EngineLoop(runner, settings=settings, acknowledgements=Nobody())
        self.loop.start()
        self._count = 0

    def __call__(self, wanted: list[Wanted]) -> Served:
        """Submit all at once and wait for them."""
        sinks = [Sink() for _ in wanted]
        began = time.perf_counter()
        for one, sink in zip(wanted, sinks, strict=True):
            self._count += 1
            params = SamplingParams(max_tokens=one.num_tokens)
            request = Request(self._count, "", np.array(one.prompt, np.int64), params, sink, is_streamed=True)
            request.arrived_at = self.loop.clock()
            request.sequences.append(TokenSequence(request, 0, Sampler(params)))
            self.loop.submit(request)
        for sink in sinks:
            sink.done.wait()
            if sink.error is not None:
                raise RuntimeError(sink.error)
        seconds = time.perf_counter() - began
        return Served([sink.first_at - began for sink in sinks], seconds, sum(sink.num_tokens for sink in sinks))


def open_vllm(directory: Path, kv_cache_dtype: str) -> Serve:
    """vLLM's engine, FP8, dummy weights, with prefix caching."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm import SamplingParams as Params

    from benchmarks.peers_gpu import hf_config

    (directory / "config.json").write_text(json.dumps(hf_config()), encoding="utf-8")
    engine = LLM(
        model=str(directory), skip_tokenizer_init=True, load_format="dummy", quantization="fp8",
        max_model_len=MAX_SEQ_LEN, gpu_memory_utilization=0.9, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=CHUNK, enable_prefix_caching=True, kv_cache_dtype=kv_cache_dtype,
    ).llm_engine  # fmt: skip
    count = 0

    def serve(wanted: list[Wanted]) -> Served:
        nonlocal count
        began = time.perf_counter()
        first: dict[str, float] = {}
        num_tokens = 0
        for one in wanted:
            params = Params(temperature=0, max_tokens=one.num_tokens, ignore_eos=True, detokenize=False)
            engine.add_request(str(count), {"prompt_token_ids": one.prompt}, params)
            count += 1
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - began)
                if output.finished:
                    num_tokens += len(output.outputs[0].token_ids)
        return Served(list(first.values()), time.perf_counter() - began, num_tokens)

    return serve


def open_ours(kv_cache: Any, gpus: int, max_num_seqs: int) -> OurEngine:
    """The cuda runner behind the engine's loop."""
    from benchmarks.decode_gpu import SHAPE
    from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
    from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
    from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
    from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights

    shape = replace(SHAPE, max_seq_len=MAX_SEQ_LEN)
    source = RandomWeights(shape, is_fp8=True, has_qkv_bias=True)
    options: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": CHUNK,
        "cache_form": CacheForm(kv_cache),
    }
    if gpus == 1:
        return OurEngine(CudaRunner(source, shape, **options))
    return OurEngine(ParallelRunner(source, shape, size=gpus, **options))


def main(argv: Sequence[str] | None = None) -> int | str:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="long and many contexts")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="pages", help="default: %(default)s")
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS, help="default: %(default)s; slots: fewer fit")
    parser.add_argument("--gpus", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--peer", choices=["vllm"], help="measure it instead of ours")
    parser.add_argument("--short", action="store_true", help="an eighth of the requests")
    parser.add_argument("--output", type=Path, default=RESULTS / "pages-gpu.json", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    share = 8 if arguments.short else 1
    if arguments.peer:
        name = f"{arguments.peer}{', fp8 cache' if arguments.kv_cache == 'pages-int8' else ''}"
        with tempfile.TemporaryDirectory() as directory:
            dtype = "fp8" if arguments.kv_cache == "pages-int8" else "auto"
            found = measure(open_vllm(Path(directory), dtype), share)
    else:
        name = f"{arguments.kv_cache}, {arguments.gpus} GPUs"
        engine = open_ours(arguments.kv_cache, arguments.gpus, arguments.max_num_seqs)
        found = measure(engine, share)
        metrics = engine.loop.metrics
        found["preemptions"], found["cache_blocks"] = metrics.preemptions_total, metrics.cache_blocks
        found["prefix_hit_tokens"] = metrics.prefix_hit_tokens_total
        engine.loop.close()
    path = arguments.output
    written = json.loads(path.read_text("utf-8")) if path.exists() else {}
    written |= {"machine": describe(), f"{name}{', short' if arguments.short else ''}": found}
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
