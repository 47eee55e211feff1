"""The same figures of what a user would pick instead: python -m benchmarks.peers_gpu

vLLM (its offline engine, FP8) and transformers (`generate`, BF16), each where it is installed, on the shape of
benchmarks/decode_gpu.py with random weights. Adds to the same JSON; run both on one machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_gpu import ANSWER, BATCHES, FILE, PROMPT, PROMPTS, SHAPE, write

# What is timed: answer `prompts` [n, prompt_len] with `num_tokens` each.
Answer = Callable[[np.ndarray[Any, np.dtype[np.int64]], int], None]


def main(argv: Sequence[str] | None = None) -> int | str:
    """Measure each peer that is installed."""
    parser = argparse.ArgumentParser(description="vLLM and transformers on one GPU")
    parser.add_argument("--output", type=Path, default=FILE, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return "error: this needs an NVIDIA GPU"
    measured = 0
    for name, (open_peer, batches) in PEERS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(hf_config()), encoding="utf-8")
            write(arguments.output, name, measure(open_peer(Path(directory)), batches))
        measured += 1
    return 0 if measured else "error: neither vLLM nor transformers is installed"


def hf_config() -> dict[str, Any]:
    """The shape as a Hugging Face configuration."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": SHAPE.vocab_size,
        "hidden_size": SHAPE.hidden_size, "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": SHAPE.num_layers, "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": SHAPE.num_kv_heads, "max_position_embeddings": 131072, "hidden_act": "silu",
        "rms_norm_eps": SHAPE.rms_norm_eps, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 151643, "eos_token_id": 151643,
    }  # fmt: skip


def measure(answer: Answer, batches: Sequence[int]) -> dict[str, Any]:
    """Time between tokens, time to first token and tokens/s, defined as for our own runner."""

    def seconds(num_requests: int, prompt_len: int, num_tokens: int, repeats: int = 3) -> float:
        prompts = np.random.default_rng(0).integers(0, 150000, (num_requests, prompt_len))
        best = float("inf")
        for _ in range(repeats):
            torch.cuda.synchronize()
            began = time.perf_counter()
            answer(prompts, num_tokens)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best

    seconds(1, 128, 8)  # warms up
    between = (seconds(1, PROMPT, 257) - seconds(1, PROMPT, 1)) / 256
    return {
        "time_between_tokens_ms": round(between * 1e3, 3),
        "time_to_first_token_ms": {n: round(seconds(1, n, 1, 5) * 1e3, 2) for n in PROMPTS},
        "tokens_per_s": {n: round(n * ANSWER / seconds(n, PROMPT, ANSWER, 2)) for n in batches},
    }


def open_vllm(directory: Path) -> Answer:
    """vLLM's offline engine, FP8, dummy weights."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(directory), skip_tokenizer_init=True, load_format="dummy", quantization="fp8", max_model_len=4096,
        gpu_memory_utilization=0.85, max_num_seqs=max(BATCHES), enable_prefix_caching=False,
    )  # fmt: skip

    def answer(prompts: np.ndarray[Any, np.dtype[np.int64]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], params, use_tqdm=False)

    return answer


def open_transformers(directory: Path) -> Answer:
    """`generate`, bfloat16, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval()
    torch.set_default_dtype(torch.float32)

    def answer(prompts: np.ndarray[Any, np.dtype[np.int64]], num_tokens: int) -> None:
        ids = torch.from_numpy(prompts).to("cuda")
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=num_tokens,
                max_new_tokens=num_tokens, pad_token_id=0,
            )  # fmt: skip

    return answer


PEERS: dict[str, tuple[Callable[[Path], Answer], Sequence[int]]] = {
    "vllm": (open_vllm, BATCHES),
    "transformers": (open_transformers, (8, 32)),  # more would take minutes and show nothing new
}

if __name__ == "__main__":
    sys.exit(main())
