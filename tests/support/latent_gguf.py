"""GGUF files of DeepSeek-V2 and V3 as llama.cpp's converter writes them, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import Array, Tensors
from tests.support.gguf_files import add_sizes, finish

MATRICES = {"down_proj": 0, "gate_proj": 1, "up_proj": 2}


def add_metadata(writer: gguf.GGUFWriter, spec: ModelSpec, *, splits_kv_b: bool) -> None:
    """splits_kv_b: as today's files; else those of before April 2025."""
    assert spec.latent is not None and spec.experts is not None
    latent, experts = spec.latent, spec.experts
    add_sizes(writer, spec)
    writer.add_rope_dimension_count(latent.qk_rope_head_dim)
    writer.add_kv_lora_rank(latent.kv_lora_rank)
    if latent.q_lora_rank:
        writer.add_q_lora_rank(latent.q_lora_rank)
    if splits_kv_b:
        writer.add_head_count_kv(1)
        writer.add_key_length(latent.kv_lora_rank + latent.qk_rope_head_dim)
        writer.add_value_length(latent.kv_lora_rank)
        writer.add_key_length_mla(latent.qk_head_dim)
        writer.add_value_length_mla(latent.v_head_dim)
    else:
        writer.add_head_count_kv(spec.num_heads)
        writer.add_key_length(latent.qk_head_dim)
        writer.add_value_length(latent.v_head_dim)
    if spec.rope.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(spec.rope.scaling))
        writer.add_rope_scaling_factor(spec.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(spec.rope.original_max_position_embeddings)
    if latent.softmax_factor != 1:
        writer.add_rope_scaling_yarn_log_mul((latent.softmax_factor**0.5 - 1) / np.log(spec.rope.factor))
    writer.add_expert_count(experts.num_experts)
    writer.add_expert_used_count(experts.num_experts_per_tok)
    writer.add_expert_shared_count(experts.num_shared_experts)
    writer.add_expert_feed_forward_length(experts.intermediate_size)
    writer.add_leading_dense_block_count(experts.first_dense_layers)
    writer.add_expert_weights_scale(experts.scale)
    writer.add_expert_weights_norm(experts.is_normalised)
    is_v3 = experts.scores == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX)
    if experts.num_groups > 1:
        writer.add_expert_group_count(experts.num_groups)
        writer.add_expert_group_used_count(experts.topk_group)


def write_latent_gguf(
    path: Path,
    spec: ModelSpec,
    tensors: Tensors,
    *,
    splits_kv_b: bool,
    joins_gate_up: bool = False,
    quantization: Quantization = Quantization.F32,
    encode: Callable[[Array, Quantization], Array] = gguf.quants.quantize,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The experts stacked, kv_b whole or in halves, the rotary channels as they are.

    joins_gate_up: each expert's gate and up are one matrix. quantization: of matrices whose rows are whole blocks; the
    router and vectors stay float32. change: adds metadata.
    """
    assert spec.latent is not None and spec.experts is not None
    latent = spec.latent
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, spec, splits_kv_b=splits_kv_b)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, spec.num_layers)

    def add(name: str, array: Array) -> None:
        if name.endswith("e_score_correction_bias"):
            name = name.removesuffix("_bias") + ".bias"  # the converter's own rename
        module, _, kind = name.rpartition(".")
        renamed = names.get_name(module)
        if renamed is None:
            assert module.endswith(("experts.gate_up_proj", "e_score_correction")), module
            new = "ffn_gate_up_exps" if module.endswith("gate_up_proj") else "exp_probs_b"
            renamed = f"blk.{module.split('.')[2]}.{new}"
        block_size = gguf.GGML_QUANT_SIZES[quantization][0]
        is_block = array.ndim > 1 and "ffn_gate_inp" not in renamed and array.shape[-1] % block_size == 0
        if is_block and quantization != Quantization.F32:
            encoded = encode(array.reshape(-1, array.shape[-1]), quantization)
            encoded = encoded.reshape(*array.shape[:-1], -1)
            writer.add_tensor(f"{renamed}.{kind}", encoded, raw_dtype=quantization)
        else:
            writer.add_tensor(f"{renamed}.{kind}", np.ascontiguousarray(array))

    stacks: dict[str, list[Array]] = {}
    for name, array in tensors.items():
        if ".mlp.experts." in name:
            before, _, matrix, kind = name.rsplit(".", 3)
            stacks.setdefault(f"{before}.{matrix}.{kind}", [])
        elif name.endswith("kv_b_proj.weight") and splits_kv_b:
            heads = array.reshape(spec.num_heads, -1, latent.kv_lora_rank)
            add(name.replace("kv_b", "k_b"), heads[:, : latent.qk_nope_head_dim].transpose(0, 2, 1))
            add(name.replace("kv_b", "v_b"), heads[:, latent.qk_nope_head_dim :])
        else:
            add(name, array)
    for name in stacks:
        before, matrix, kind = name.rsplit(".", 2)
        stacks[name] = [tensors[f"{before}.{i}.{matrix}.{kind}"] for i in range(spec.experts.num_experts)]
    for name, arrays in stacks.items():
        if joins_gate_up and ".gate_proj" in name:
            pairs = zip(arrays, stacks[name.replace("gate_proj", "up_proj")], strict=True)
            add(name.replace("gate_proj", "gate_up_proj"), np.stack([np.concatenate(pair) for pair in pairs]))
        elif not (joins_gate_up and ".up_proj" in name):
            add(name, np.stack(arrays))
    finish(writer)
    return path
