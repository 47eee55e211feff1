"""Measure the same figures of vLLM and transformers: python -m benchmarks.peers_gpu

vLLM (its offline engine, FP8) and transformers (`generate`, BF16), each where it is installed, on a shape of
benchmarks/decode_gpu.py with random weights. Adds to the same JSON; run both on one machine. `vllm --shape v2-lite`
measures vLLM alone on DeepSeek-V2-Lite's shape, with `--gpus 2` on two GPUs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_gpu import ANSWER, BATCHES, FILE, PROMPT, PROMPTS, SHAPE, SHAPES, file_of, write
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.weights import CODES_STD

# What is timed: answer `prompts` [n, prompt_len] with `num_tokens` each.
Answer = Callable[[np.ndarray[Any, np.dtype[np.int64]], int], None]


def main(argv: Sequence[str] | None = None) -> int | str:
    """Measure each peer that is installed."""
    parser = argparse.ArgumentParser(description="vLLM and transformers on one GPU, vLLM on several")
    parser.add_argument("peers", nargs="*", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="r1-distill-qwen-7b", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help=f"default: {FILE}, of another shape beside it")
    parser.add_argument("--gpus", type=int, default=1, help="split vLLM's model over so many (default: %(default)s)")
    parser.add_argument("--expert-parallel", action="store_true", help="each of them has whole experts of vLLM's")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return "error: this needs an NVIDIA GPU"
    measured, shape = 0, SHAPES[arguments.shape]
    split = f", {arguments.gpus} GPUs" if arguments.gpus > 1 else ""
    split += ", expert parallel" if arguments.expert_parallel else ""
    for name, (open_peer, batches) in PEERS.items():
        if (arguments.peers and name not in arguments.peers) or (split and name != "vllm"):
            continue
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(hf_config(shape)), encoding="utf-8")
            if split:
                open_peer = partial(open_vllm, gpus=arguments.gpus, is_expert_parallel=arguments.expert_parallel)
            figures = measure(open_peer(Path(directory)), batches, shape.vocab_size)
            print(json.dumps(figures, indent=1), flush=True)
            write(arguments.output or file_of(arguments.shape), name + split, figures, shape)
        measured += 1
    return 0 if measured else "error: neither vLLM nor transformers is installed"


def hf_config(shape: DecoderShape = SHAPE) -> dict[str, Any]:
    """The shape as a Hugging Face configuration."""
    values = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "max_position_embeddings": 131072, "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    latent, experts = shape.latent, shape.experts
    if latent is None:
        return values
    values |= {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank, "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim, "v_head_dim": latent.v_head_dim, "attention_bias": False,
        "rope_theta": 10000, "first_k_dense_replace": shape.num_layers, "moe_layer_freq": 1,
        # V2-Lite's own, from its config.json
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707,
        },
        "max_position_embeddings": 163840,
    }  # fmt: skip
    if experts is not None:
        values |= {
            "n_routed_experts": experts.num_experts, "num_experts_per_tok": experts.num_experts_per_tok,
            "moe_intermediate_size": experts.intermediate_size, "n_shared_experts": experts.num_shared_experts,
            "first_k_dense_replace": experts.first_dense_layers, "scoring_func": experts.scores,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": experts.is_normalised,
            "routed_scaling_factor": experts.scale,
        }  # fmt: skip
    return values


def measure(answer: Answer, batches: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Time between tokens, time to first token and tokens/s, defined as for our own runner."""

    def seconds(num_requests: int, prompt_len: int, num_tokens: int, repeats: int = 3) -> float:
        prompts = np.random.default_rng(0).integers(2, vocab_size, (num_requests, prompt_len))
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


def open_vllm(directory: Path, *, gpus: int = 1, is_expert_parallel: bool = False) -> Answer:
    """vLLM's offline engine, FP8, dummy weights, those of experts as `spread_experts` makes them.

    is_expert_parallel: attention is split over the GPUs as without it, but each has whole experts.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are changed in this process, or its workers
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # CUDA may have been asked in this process
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(directory), skip_tokenizer_init=True, load_format="dummy", quantization="fp8", max_model_len=4096,
        gpu_memory_utilization=0.85, max_num_seqs=max(BATCHES), enable_prefix_caching=False,
        tensor_parallel_size=gpus, enable_expert_parallel=is_expert_parallel,
    )  # fmt: skip
    engine.apply_model(spread_experts)

    def answer(prompts: np.ndarray[Any, np.dtype[np.int64]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], params, use_tqdm=False)

    return answer


def spread_experts(model: torch.nn.Module) -> None:
    """Give vLLM's mixture of experts weights like ours; a dense model is left as it is.

    vLLM's dummy weights are below 0.001: a layer adds nearly nothing, so equal tokens get equal experts and equal next
    tokens, whatever was before them. Fewer experts are read then than real texts need. On several GPUs each process
    gets its own parts, and the same of what all have whole.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.linear import ReplicatedLinear

    modules = list(model.modules())
    if not any(hasattr(module, "w13_weight") for module in modules):
        return
    device = next(model.parameters()).device
    whole, part_of_rank = (
        torch.Generator(device).manual_seed(seed) for seed in (0, 1 + get_tensor_model_parallel_rank())
    )
    for module in modules:
        generator = whole if isinstance(module, ReplicatedLinear) else part_of_rank
        for name in ("weight", "w13_weight", "w2_weight"):
            weight = getattr(module, name, None)
            if not isinstance(weight, torch.Tensor):
                continue
            if weight.dim() == 1:  # a norm
                weight.data.fill_(1.0)
                continue
            # A linear layer's FP8 weights are transposed.
            columns = getattr(module, "input_size", weight.shape[-1])
            if name == "w2_weight":
                columns *= getattr(getattr(module, "moe_config", None), "tp_size", 1)
            is_fp8 = weight.dtype == torch.float8_e4m3fn
            for part in weight.data if weight.dim() == 3 else [weight.data]:
                noise = torch.randn(part.shape, device=device, generator=generator)
                part.copy_(noise.mul_(CODES_STD if is_fp8 else columns**-0.5).clamp_(-448, 448))
            if is_fp8:
                getattr(module, f"{name}_scale").data.fill_(columns**-0.5 / CODES_STD)
        for name in ("W_UK_T", "W_UV"):  # of latent attention
            if isinstance(matrix := getattr(module, name, None), torch.Tensor):
                matrix.copy_(torch.randn(matrix.shape, device=device, generator=generator) * 512**-0.5)


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
