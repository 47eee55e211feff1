"""Graphs for the TensorRT builder's tests: one random layer of any size, and a plain round-to-nearest FP8 version."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.builders.tensorrt.build import EngineReport, build_engine
from deepseek_triton.ensemble.decoder.spec import ModelSpec

E4M3_MAX = 448.0
SLOTS, CHUNK = 4, 32


def small_spec(**changes: Any) -> ModelSpec:
    """Two layers that build in seconds; head_dim is one that TensorRT has fused attention for."""
    values: dict[str, Any] = {
        "architecture": "llama", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "qkv_bias": False, "qk_norm": False,
    }  # fmt: skip
    return ModelSpec(**{**values, **changes})


def qwen_layer(hidden: int, intermediate: int, heads: int, kv_heads: int, vocab_size: int = 1024) -> ModelSpec:
    """One layer of a DeepSeek-R1-Distill-Qwen; head and embedding small, which no layer's kernels depend on."""
    return small_spec(
        architecture="qwen2", vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=128,
        max_position_embeddings=131072, qkv_bias=True,
    )  # fmt: skip


def random_weights(spec: ModelSpec) -> Callable[[str], NDArray[Any]]:
    """Weights of the right shapes; large ones repeat one random row, because gigabytes of random numbers take
    a minute."""
    random = np.random.default_rng(0)

    def read(name: str) -> NDArray[Any]:
        shape = spec.tensor_shapes()[name]
        if math.prod(shape) < 2**20:
            return random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float16)
        row = random.normal(0, 0.02, shape[-1]).astype(np.float16)
        return np.broadcast_to(row, shape)

    return read


def linear_modules(spec: ModelSpec) -> list[str]:
    """Every linear layer but the head, by Hugging Face's name."""
    suffix = "_proj.weight"
    return [name.removesuffix(".weight") for name in spec.tensor_shapes() if name.endswith(suffix)]


def write_graph(spec: ModelSpec, directory: Path, **options: Any) -> Path:
    """The decoder's graph with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    return build_graph(spec, random_weights(spec), directory, **{"max_seq_len": 256, "precision": "fp16", **options})


def rounded_to_nearest(
    read: Callable[[str], NDArray[Any]], *, is_dynamic: bool = False, keep: tuple[str, ...] = ()
) -> Callable[[str], Float8Linear | None]:
    """`build_graph`'s `quantized`: every linear layer but the head in FP8, one scale for each output channel."""

    def quantized(module: str) -> Float8Linear | None:
        if not module.endswith("_proj") or module in keep:
            return None
        weight = read(f"{module}.weight")
        # Of a row that is repeated, one is enough.
        rows = weight[:1] if weight.strides[0] == 0 else weight
        scale = (np.abs(rows).max(axis=1) / E4M3_MAX).astype(np.float16).astype(np.float32)
        codes = (rows / scale[:, None]).astype(ml_dtypes.float8_e4m3fn)
        scales = np.broadcast_to(scale, len(weight))
        bias: NDArray[np.float32] | None = None
        with contextlib.suppress(KeyError):
            bias = read(f"{module}.bias").astype(np.float32)
        return Float8Linear(np.broadcast_to(codes, weight.shape), scales, None if is_dynamic else 0.02, bias)

    return quantized


def write_fp8_graph(
    spec: ModelSpec, directory: Path, *, is_dynamic: bool = False, keep: tuple[str, ...] = (), **options: Any
) -> Path:
    """The decoder's graph in FP8 with random weights."""
    quantized = rounded_to_nearest(random_weights(spec), is_dynamic=is_dynamic, keep=keep)
    return write_graph(spec, directory, quantized=quantized, **options)


def build_small(graph: Path, output: Path, **options: Any) -> EngineReport:
    """`build_engine` with what fits the small graphs; `options` go before."""
    defaults: dict[str, Any] = {
        "target": "tensorrt-rtx", "precision": "fp16", "max_num_seqs": SLOTS, "max_num_batched_tokens": CHUNK,
        "max_seq_len": 256, "compute_capability": "8.9",
    }  # fmt: skip
    return build_engine(graph, output, **{**defaults, **options})
