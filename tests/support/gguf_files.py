"""GGUF files as llama.cpp's converter writes them, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import Array, Tensors

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# Where a block of each type has its float16 numbers, by ggml-common.h.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def permuted(array: Array, num_heads: int) -> Array:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def add_sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """What files of every architecture say of their decoder, and their tokens last."""
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_head_count(spec.num_heads)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_eos_token_id(spec.eos_token_ids[0])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(spec.vocab_size)])


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    spec: ModelSpec,
    tensors: Tensors,
    quantization: Quantization = Quantization.F32,
    encode: Callable[[Array, Quantization], Array] = gguf.quants.quantize,
    *,
    architecture: str | None = None,
    more: Tensors | None = None,
    **options: Any,
) -> Path:
    """As llama.cpp's converter writes it: matrices quantised, vectors float32, llama's q and k permuted.

    options: of the writer.
    """
    writer = gguf.GGUFWriter(path, architecture or spec.architecture, **options)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    add_sizes(writer, spec)
    for name, array in tensors.items():
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if heads and spec.architecture == "llama":
            array = permuted(array, heads)
        if array.ndim == 2:
            writer.add_tensor(gguf_name(name), encode(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def k_quant_blocks(array: Array, quantization: Quantization) -> Array:
    """Random blocks with small finite scales, in the layout of ggml-common.h."""
    random = np.random.default_rng(array.size)
    block_size, type_size = gguf.GGML_QUANT_SIZES[quantization]
    blocks = random.integers(0, 256, (array.size // block_size, type_size), np.uint8)
    for start in HALVES[quantization.name]:
        scales = random.uniform(0.001, 0.1, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(array.shape[0], -1)
