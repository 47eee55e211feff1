"""Compare the cuda runner with the GPU's memory bandwidth: python -m benchmarks.decode_gpu

DeepSeek-R1-Distill-Qwen-7B's shape (--shape v2-lite: DeepSeek-V2-Lite's, latent attention and experts), FP8, random
weights made on the GPU, greedy, nothing ends early. The floor is the bytes that a step of batch 1 must read, of experts
those of the chosen ones, over the read rate measured in the same run. Requests are served by a driver on the
runner, as the engine's loop would: prompts in packed chunks, then all of them a token at a time. Writes
benchmarks/results/decode-gpu.json and, with matplotlib, decode-gpu.png; figures of peers_gpu.py in the same JSON are
kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.engine.runners.base import LAST_TOKEN, DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
from deepseek_triton.ensemble.protocol.settings import KV_CACHES, KvCache
from deepseek_triton.extras import install_command

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "decode-gpu.json"
PROMPT, ANSWER = 512, 128  # tokens of each request
BATCHES = (8, 32, 64, 128, 256)
PROMPTS = (128, 512, 2048)
SHAPE = DecoderShape(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
    head_dim=128, rms_norm_eps=1e-6, max_seq_len=4096,
)  # fmt: skip
V2_LITE = DecoderShape(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_layers=27, num_heads=16, num_kv_heads=16,
    head_dim=192, rms_norm_eps=1e-6, max_seq_len=4096,
    latent=LatentOptions(
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        softmax_factor=(0.1 * 0.707 * math.log(40) + 1) ** 2,
    ),
    experts=ExpertOptions(
        num_experts=64, num_experts_per_tok=6, intermediate_size=1408, num_shared_experts=2, first_dense_layers=1,
        scores="softmax", choice="greedy",
    ),
)  # fmt: skip
V3 = DecoderShape(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_layers=61, num_heads=128, num_kv_heads=128,
    head_dim=192, rms_norm_eps=1e-6, max_seq_len=4096,
    latent=LatentOptions(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        softmax_factor=(0.1 * math.log(40) + 1) ** 2,
    ),
    experts=ExpertOptions(
        num_experts=256, num_experts_per_tok=8, intermediate_size=2048, num_shared_experts=1, first_dense_layers=3,
        scores="sigmoid", choice="group_top2", num_groups=8, topk_group=4, is_normalised=True, scale=2.5,
    ),
)  # fmt: skip
SHAPES = {"r1-distill-qwen-7b": SHAPE, "v2-lite": V2_LITE, "v2-lite-dense": replace(V2_LITE, experts=None)}
GREEDY = DeviceSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0)
# vLLM 0.24.0 on one H100, quantization="fp8", measured on the same shape beforehand: for the plot where it isn't here.
VLLM = {
    "time_between_tokens_ms": 4.14,
    "time_to_first_token_ms": {128: 6.6, 512: 9.9, 2048: 32.8},
    "tokens_per_s": {8: 1683, 32: 4797, 64: 7239, 128: 9193, 256: 10460},
}


def main(argv: Sequence[str] | None = None) -> int | str:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="the cuda runner on one GPU")
    parser.add_argument("--output", type=Path, help=f"default: {FILE}, of another shape beside it")
    parser.add_argument("--invariant", action="store_true", help="measure the batch-invariant mode")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="slots", help="default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="r1-distill-qwen-7b", help="default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="default: %(default)s")
    parser.add_argument("--gpus", type=int, default=1, help="split the model over so many (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return "error: this needs an NVIDIA GPU"
    shape = SHAPES[arguments.shape]
    ours = measure(
        shape, is_invariant=arguments.invariant, gpus=arguments.gpus, kv_cache=arguments.kv_cache,
        batches=arguments.batches,
    )  # fmt: skip
    name = "cuda" if arguments.gpus == 1 else f"cuda, {arguments.gpus} GPUs"
    name += "" if arguments.kv_cache == "slots" else f", {arguments.kv_cache}"
    write(
        arguments.output or file_of(arguments.shape),
        f"{name} (batch-invariant)" if arguments.invariant else name,
        ours,
        shape,
    )
    return 0


def file_of(name: str) -> Path:
    """Where the figures of one of `SHAPES` are kept."""
    return FILE if SHAPES[name] == SHAPE else FILE.with_stem(f"{FILE.stem}-{name}")


AnyRunner = CudaRunner | ParallelRunner


def measure(
    shape: DecoderShape = SHAPE,
    *,
    is_invariant: bool,
    gpus: int = 1,
    kv_cache: KvCache = "slots",
    batches: Sequence[int] = BATCHES,
) -> dict[str, Any]:
    """Every figure of one runner, for `batches` and `PROMPTS`; all GPUs together read the floor's bytes."""
    rate = read_rate()
    source = random_weights(shape)
    began = time.perf_counter()
    runner = open_runner(source, shape, gpus, max_num_seqs=max(batches), kv_cache=kv_cache, is_invariant=is_invariant)
    result: dict[str, Any] = {
        "load_s": round(time.perf_counter() - began, 1),
        "read_gb_per_s": round(rate / 1e9),
        "floor_ms": round(step_bytes(shape, source) / rate / gpus * 1e3, 3),
    }
    result["time_between_tokens_ms"] = round(time_between_tokens(runner) * 1e3, 3)
    result["of_floor_rate"] = round(result["floor_ms"] / result["time_between_tokens_ms"], 3)
    result["time_to_first_token_ms"] = {n: round(time_to_first_token(runner, n) * 1e3, 2) for n in PROMPTS}
    result["tokens_per_s"] = {n: round(tokens_per_second(runner, n)) for n in batches}
    runner.close()
    print(json.dumps(result, indent=1))
    return result


def random_weights(shape: DecoderShape) -> RandomWeights:
    """In FP8, with a scale for each row."""
    return RandomWeights(shape, is_fp8=True, has_qkv_bias=shape == SHAPE)


def open_runner(
    source: RandomWeights,
    shape: DecoderShape,
    gpus: int,
    *,
    max_num_seqs: int,
    kv_cache: KvCache,
    is_invariant: bool = False,
    expert_size: int = 1,
    max_num_batched_tokens: int = 8192,
) -> AnyRunner:
    """A runner on so many GPUs, whose slots have their blocks; expert_size: as ParallelRunner's."""
    options: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "is_invariant": is_invariant,
        "cache_form": CacheForm(kv_cache),
    }
    runner: AnyRunner = (
        CudaRunner(source, shape, **options)
        if gpus == 1
        else ParallelRunner(source, shape, size=gpus, expert_size=expert_size, **options)
    )
    give_blocks(runner)
    return runner


def step_bytes(shape: DecoderShape, source: RandomWeights) -> float:
    """Bytes of weights that a step of one token reads."""
    chosen = 1.0 if shape.experts is None else shape.experts.num_experts_per_tok / shape.experts.num_experts
    return sum(
        entry.num_bytes * (chosen if ".experts_" in name else 1)
        for name, entry in source.entries.items()
        if not name.startswith(("embedding", "rope"))
    )


def give_blocks(runner: AnyRunner) -> None:
    """Give every slot of a runner with pages its blocks, far from each other, as after hours of serving."""
    width = min(runner.num_blocks // runner.max_num_seqs, -(-runner.max_seq_len // runner.block_size))
    blocks = 1 + np.random.default_rng(0).permutation(runner.num_blocks)[: runner.max_num_seqs * width]
    for slot, part in enumerate(blocks.reshape(runner.max_num_seqs, width).tolist()):
        runner.set_blocks(slot, 0, part)


def read_rate() -> float:
    """The GPU's read rate in bytes/s, measured by a reduction over 4 GiB."""
    values = torch.empty(2**30, device="cuda").normal_()
    return values.numel() * 4 / _median(lambda: values.sum(), 9)


def time_between_tokens(runner: AnyRunner) -> float:
    """Seconds between two tokens: (a 257-token answer - a 1-token answer) / 256, the best of 3."""
    return min((_generate(runner, 257) - _generate(runner, 1)) / 256 for _ in range(3))


def time_to_first_token(runner: AnyRunner, num_tokens: int) -> float:
    """Seconds from a prompt's ids to its first token's id, both on the host."""
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, num_tokens)
    return _median(lambda: prefill(runner, [PromptChunk(0, ids, 0)]), 7)


def tokens_per_second(runner: AnyRunner, num_requests: int) -> float:
    """Output tokens/s of `num_requests` at once, including the time of their prompts; the better of 2."""
    return max(num_requests * ANSWER / _serve(runner, num_requests) for _ in range(2))


def _generate(runner: AnyRunner, num_tokens: int) -> float:
    """Seconds for one request of `num_tokens`; each step starts before the token of the last one is back."""
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, PROMPT)
    began = time.perf_counter()
    tokens = prefill(runner, [PromptChunk(0, ids, 0)])
    decode(runner, tokens, PROMPT, num_tokens - 1)
    return time.perf_counter() - began


def _serve(runner: AnyRunner, num_requests: int) -> float:
    prompts = np.random.default_rng(0).integers(0, runner.vocab_size, (num_requests, PROMPT))
    at_once = max(1, 8192 // PROMPT)
    began = time.perf_counter()
    tokens = prefill(runner, *(
        [PromptChunk(slot, prompts[slot], 0) for slot in range(first, min(first + at_once, num_requests))]
        for first in range(0, num_requests, at_once)
    ))  # fmt: skip
    decode(runner, tokens, PROMPT, ANSWER - 1)
    return time.perf_counter() - began


def prefill(runner: AnyRunner, *batches: list[PromptChunk]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first tokens [prompts] of the prompts in these batches, with two batches in flight."""
    tokens: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for number, chunks in enumerate(batches):
        runner.start_prefill(chunks, [GREEDY] * len(chunks), [])
        if number:
            tokens.append(runner.finish_prefill().tokens.copy())
    tokens.append(runner.finish_prefill().tokens.copy())
    return np.concatenate(tokens)


def decode(runner: AnyRunner, tokens: np.ndarray[Any, np.dtype[np.int64]], position: int, num_steps: int) -> None:
    """Decode `num_steps` tokens for each of slots 0 … len(tokens) − 1, with two steps in flight."""
    samplings = [GREEDY] * len(tokens)
    ids, positions = tokens, np.full(len(tokens), position)
    for step in range(num_steps):
        runner.start_decode(ids, positions + step, samplings, [])
        ids = np.full(len(tokens), LAST_TOKEN)
        if step:
            runner.finish_decode()
    if num_steps:
        runner.finish_decode()


def _median(run: Callable[[], object], repeats: int) -> float:
    """The median in seconds, after two runs to warm up."""
    seconds = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat > 1:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def write(file: Path, name: str, figures: dict[str, Any], shape: DecoderShape = SHAPE) -> None:
    """Add one engine's figures to the file, and plot all engines."""
    known = json.loads(file.read_text(encoding="utf-8"))["engines"] if file.exists() else {}
    known[name] = json.loads(json.dumps(figures))
    machine = describe() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"shape": shape.to_dict(), "machine": machine, "engines": known}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    try:
        plot(known, file.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed; run: {install_command('plot')}", file=sys.stderr)


def plot(engines: dict[str, Any], file: Path) -> None:
    """Plot time to first token and tokens/s, one line for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = {"vLLM 0.24 (measured earlier)": json.loads(json.dumps(VLLM))} if file.stem == FILE.stem else {}
    shown = {**known, **engines}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = (
        ("time_to_first_token_ms", "prompt tokens", "ms to the first token"),
        ("tokens_per_s", "requests of 512 + 128 tokens at once", "output tokens/s"),
    )
    for axis, (key, x, y) in zip(axes, panels, strict=True):
        for name, figures in shown.items():
            if key in figures:
                axis.plot([int(n) for n in figures[key]], list(figures[key].values()), marker="o", label=name)
        axis.set(xlabel=x, ylabel=y, xscale="log")
        axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
