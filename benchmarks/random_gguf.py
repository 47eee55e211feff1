"""GGUF files of real shapes with random Q4_0 weights, and a vocabulary that stands for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RandomWriter:
    """Writes matrices of random blocks. Layers of one shape have the same weights: what is read is as much."""

    def __init__(self, path: Path, architecture: str) -> None:
        import gguf

        self._gguf = gguf
        self.writer: Any = gguf.GGUFWriter(path, architecture)
        self._random = np.random.default_rng(0)
        self._blocks: dict[tuple[int, ...], NDArray[np.uint8]] = {}

    def matrix(self, name: str, *shape: int) -> None:
        """Random blocks of Q4_0, [..., out, in]."""
        if shape not in self._blocks:
            *rows, columns = shape
            raw = self._random.integers(0, 256, (*rows, columns // 32, 18), np.uint8)
            raw[..., :2] = np.frombuffer(np.float16(0.2 / columns**0.5).tobytes(), np.uint8)
            self._blocks[shape] = raw.reshape(*rows, -1)
        kind = self._gguf.GGMLQuantizationType.Q4_0
        self.writer.add_tensor(f"{name}.weight", self._blocks[shape], raw_dtype=kind)

    def floats(self, name: str, *shape: int, scale: float = 0.0, offset: float = 0.0) -> None:
        """offset + scale x random normal numbers."""
        values = offset + scale * self._random.standard_normal(shape, np.float32)
        self.writer.add_tensor(name, values.astype(np.float32))

    def sizes(self, *, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> None:
        """What every decoder says of itself, and a vocabulary of the names t0, t1, …"""
        writer = self.writer
        writer.add_block_count(layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(["t", "0", *(f"t{number}" for number in range(vocab - 2))])
        writer.add_token_types([1] * vocab)
        writer.add_token_merges(["t 0"])
        writer.add_eos_token_id(vocab - 1)

    def close(self) -> None:
        """Write the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_qwen(path: Path) -> None:
    """R1-Distill-Qwen-1.5B's shape."""
    hidden, inner, layers, heads, kv_heads, vocab = 1536, 8960, 28, 12, 2, 151936
    file = RandomWriter(path, "qwen2")
    file.sizes(layers=layers, hidden=hidden, inner=inner, heads=heads, kv_heads=kv_heads, vocab=vocab)
    file.matrix("token_embd", vocab, hidden)
    file.matrix("output", vocab, hidden)
    file.floats("output_norm.weight", hidden, offset=1.0)
    kv_width = hidden // heads * kv_heads
    for layer in range(layers):
        block = f"blk.{layer}"
        for name, rows in (("attn_q", hidden), ("attn_k", kv_width), ("attn_v", kv_width)):
            file.matrix(f"{block}.{name}", rows, hidden)
            file.floats(f"{block}.{name}.bias", rows)
        file.matrix(f"{block}.attn_output", hidden, hidden)
        file.matrix(f"{block}.ffn_gate", inner, hidden)
        file.matrix(f"{block}.ffn_up", inner, hidden)
        file.matrix(f"{block}.ffn_down", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            file.floats(f"{block}.{name}.weight", hidden, offset=1.0)
    file.close()


def write_v2_lite(path: Path) -> None:
    """V2-Lite's shape; its router's scores are as far apart as random states make them."""
    hidden, dense, layers, heads, vocab = 2048, 10944, 27, 16, 102400
    rank, rope, nope, value, experts, inner = 512, 64, 128, 128, 64, 1408
    file = RandomWriter(path, "deepseek2")
    writer = file.writer
    file.sizes(layers=layers, hidden=hidden, inner=dense, heads=heads, kv_heads=1, vocab=vocab)
    writer.add_rope_dimension_count(rope)
    writer.add_vocab_size(vocab)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(6)
    writer.add_expert_shared_count(2)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(False)
    file.matrix("token_embd", vocab, hidden)
    file.matrix("output", vocab, hidden)
    file.floats("output_norm.weight", hidden, offset=1.0)
    for layer in range(layers):
        block = f"blk.{layer}"
        file.matrix(f"{block}.attn_q", heads * (nope + rope), hidden)
        file.matrix(f"{block}.attn_kv_a_mqa", rank + rope, hidden)
        file.floats(f"{block}.attn_kv_a_norm.weight", rank, offset=1.0)
        file.matrix(f"{block}.attn_k_b", heads, rank, nope)
        file.matrix(f"{block}.attn_v_b", heads, value, rank)
        file.matrix(f"{block}.attn_output", hidden, heads * value)
        for name in ("attn_norm", "ffn_norm"):
            file.floats(f"{block}.{name}.weight", hidden, offset=1.0)
        if layer == 0:
            for name, shape in (("gate", (dense, hidden)), ("up", (dense, hidden)), ("down", (hidden, dense))):
                file.matrix(f"{block}.ffn_{name}", *shape)
            continue
        file.floats(f"{block}.ffn_gate_inp.weight", experts, hidden, scale=0.02)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            file.matrix(f"{block}.ffn_{name}_exps", experts, *shape)
            shared = tuple(2 * size if size == inner else size for size in shape)
            file.matrix(f"{block}.ffn_{name}_shexp", *shared)
    file.close()


SHAPES: dict[str, Callable[[Path], None]] = {"qwen-1.5b": write_qwen, "v2-lite": write_v2_lite}
