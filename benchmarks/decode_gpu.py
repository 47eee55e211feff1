"""How near the cuda runner comes to what one GPU can do: python -m benchmarks.decode_gpu

DeepSeek-R1-Distill-Qwen-7B's shape, FP8, random weights made on the GPU, greedy, nothing ends early. The floor is the
bytes that a step must read over the read rate measured in the same run. Requests are served by a driver on the
runner, as the engine's loop would: prompts in packed chunks, then all of them a token at a time. Writes
benchmarks/results/decode-gpu.json and, with matplotlib, decode-gpu.png; figures of peers_gpu.py in the same JSON are
kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.base import LAST_TOKEN, DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
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
    parser.add_argument("--output", type=Path, default=FILE, help="default: %(default)s")
    parser.add_argument("--invariant", action="store_true", help="measure the batch-invariant mode")
    parser.add_argument("--gpus", type=int, default=1, help="split the model over so many (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return "error: this needs an NVIDIA GPU"
    ours = measure(is_invariant=arguments.invariant, gpus=arguments.gpus)
    name = "cuda" if arguments.gpus == 1 else f"cuda, {arguments.gpus} GPUs"
    write(arguments.output, f"{name} (batch-invariant)" if arguments.invariant else name, ours)
    return 0


AnyRunner = CudaRunner | ParallelRunner


def measure(*, is_invariant: bool, gpus: int = 1) -> dict[str, Any]:
    """Every figure of one runner, at the sizes of `BATCHES` and `PROMPTS`; the floor's bytes are read by all GPUs."""
    rate = read_rate()
    source = RandomWeights(SHAPE, is_fp8=True, has_qkv_bias=True)
    step_bytes = sum(entry.num_bytes for name, entry in source.entries.items() if not name.startswith(("emb", "rope")))
    began = time.perf_counter()
    options: dict[str, Any] = {
        "max_num_seqs": max(BATCHES),
        "max_num_batched_tokens": 8192,
        "is_invariant": is_invariant,
    }
    runner: AnyRunner = (
        CudaRunner(source, SHAPE, **options) if gpus == 1 else ParallelRunner(source, SHAPE, size=gpus, **options)
    )
    result: dict[str, Any] = {
        "load_s": round(time.perf_counter() - began, 1),
        "read_gb_per_s": round(rate / 1e9),
        "floor_ms": round(step_bytes / rate / gpus * 1e3, 3),
    }
    result["time_between_tokens_ms"] = round(time_between_tokens(runner) * 1e3, 3)
    result["of_floor_rate"] = round(result["floor_ms"] / result["time_between_tokens_ms"], 3)
    result["time_to_first_token_ms"] = {n: round(time_to_first_token(runner, n) * 1e3, 2) for n in PROMPTS}
    result["tokens_per_s"] = {n: round(tokens_per_second(runner, n)) for n in BATCHES}
    runner.close()
    print(json.dumps(result, indent=1))
    return result


def read_rate() -> float:
    """Bytes a second that the GPU reads, by a reduction over 4 GiB."""
    values = torch.empty(2**30, device="cuda").normal_()
    return values.numel() * 4 / _median(lambda: values.sum(), 9)


def time_between_tokens(runner: AnyRunner) -> float:
    """Seconds: a 257-token answer less a 1-token answer, over 256; the best of 3."""
    return min((_generate(runner, 257) - _generate(runner, 1)) / 256 for _ in range(3))


def time_to_first_token(runner: AnyRunner, num_tokens: int) -> float:
    """Seconds from a prompt's ids to its first token's id, both on the host."""
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, num_tokens)
    return _median(lambda: runner.prefill(0, ids, 0).argmax(), 7)


def tokens_per_second(runner: AnyRunner, num_requests: int) -> float:
    """Output tokens a second of `num_requests` at once, their prompts' time included; the better of 2."""
    return max(num_requests * ANSWER / _serve(runner, num_requests) for _ in range(2))


def _generate(runner: AnyRunner, num_tokens: int) -> float:
    """Seconds for one request of `num_tokens`; each step is begun before the last one's token is back."""
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, PROMPT)
    began = time.perf_counter()
    token = runner.prefill(0, ids, 0).argmax()
    _decode(runner, np.array([token]), PROMPT, num_tokens - 1)
    return time.perf_counter() - began


def _serve(runner: AnyRunner, num_requests: int) -> float:
    prompts = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (num_requests, PROMPT))
    at_once = max(1, 8192 // PROMPT)
    began = time.perf_counter()
    tokens = np.zeros(num_requests, np.int64)
    for first in range(0, num_requests, at_once):
        slots = range(first, min(first + at_once, num_requests))
        logits = runner.prefill_many([PromptChunk(slot, prompts[slot], 0) for slot in slots])
        tokens[slots.start : slots.stop] = logits.argmax(axis=1)
    _decode(runner, tokens, PROMPT, ANSWER - 1)
    return time.perf_counter() - began


def _decode(runner: AnyRunner, tokens: np.ndarray[Any, np.dtype[np.int64]], position: int, num_steps: int) -> None:
    """`num_steps` tokens for each of slots 0 … len(tokens) − 1, with two steps in flight."""
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
    """Seconds, after two runs to warm up."""
    seconds = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat > 1:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def write(file: Path, name: str, figures: dict[str, Any]) -> None:
    """Add one engine's figures to the file's, and draw all of them."""
    known = json.loads(file.read_text(encoding="utf-8"))["engines"] if file.exists() else {}
    known[name] = json.loads(json.dumps(figures))
    machine = describe() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"shape": SHAPE.to_dict(), "machine": machine, "engines": known}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    try:
        plot(known, file.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed; run: {install_command('plot')}", file=sys.stderr)


def plot(engines: dict[str, Any], file: Path) -> None:
    """Time to first token and tokens a second, one line for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"vLLM 0.24 (measured earlier)": json.loads(json.dumps(VLLM)), **engines}
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
