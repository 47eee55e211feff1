"""ModelSpec → Hugging Face's `config.json`: the way back of hf_config.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.builders.graph.rope import inverse_frequencies
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec

CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}  # fmt: skip
# How a checkpoint was stored, or what only its removed layers had: what is written has neither.
DROPPED = ("quantization_config", "compression_config", "torch_dtype", "num_mtp_layers", "head_dim")
# The original contexts and factors of Llama 3's releases: GGUF files carry the frequencies that they give.
LLAMA3 = [RopeSpec(scaling="llama3", factor=factor, original_max_position_embeddings=8192) for factor in (8.0, 32.0)]


def changed_config(config: Mapping[str, Any], spec: ModelSpec, layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """A checkpoint's own `config` with the dimensions of `spec`.

    layers: which of its layers are left. dtype: of most tensors, by its name in torch.
    """
    changed = {key: value for key, value in config.items() if key not in DROPPED}
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := config.get(key), list):
            changed[key] = [kinds[layer] for layer in layers]
    if "num_nextn_predict_layers" in config:
        changed["num_nextn_predict_layers"] = 0
    return {**changed, **_dimensions(spec), "dtype": dtype}


def config_from_spec(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The whole `config.json` of a model whose source has none, as a GGUF.

    Raises:
        UnsupportedError: rotary frequencies that no configuration of Hugging Face gives.
    """
    values: dict[str, Any] = {
        "architectures": [CLASSES[spec.architecture]],
        "model_type": spec.architecture,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "eos_token_id": list(spec.eos_token_ids),
        "rope_theta": spec.rope.theta,
        **_dimensions(spec),
        "dtype": dtype,
    }
    if spec.architecture != "qwen2":  # whose q, k and v always have biases, and nothing else
        values["attention_bias"] = spec.o_bias if spec.latent is None else spec.latent.has_bias
    if spec.architecture == "llama":
        values["mlp_bias"] = spec.mlp_bias
    scaling = _rope_scaling(spec)
    return {**values, "rope_scaling": scaling} if scaling else values


def _dimensions(spec: ModelSpec) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_hidden_layers": spec.num_layers,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    if spec.latent is None:
        values["head_dim"] = spec.head_dim
    else:
        latent = spec.latent
        values |= {
            "q_lora_rank": latent.q_lora_rank,
            "kv_lora_rank": latent.kv_lora_rank,
            "qk_nope_head_dim": latent.qk_nope_head_dim,
            "qk_rope_head_dim": latent.qk_rope_head_dim,
            "v_head_dim": latent.v_head_dim,
        }
        if not latent.is_interleaved:
            values["rope_interleave"] = False
        if latent.indexer is not None:
            indexer = latent.indexer
            values |= {
                "index_n_heads": indexer.num_heads,
                "index_head_dim": indexer.head_dim,
                "index_topk": indexer.topk,
            }
    if spec.experts is not None:
        experts = spec.experts
        values |= {
            "n_routed_experts": experts.num_experts,
            "num_experts_per_tok": experts.num_experts_per_tok,
            "moe_intermediate_size": experts.intermediate_size,
            "n_shared_experts": experts.num_shared_experts,
            "first_k_dense_replace": experts.first_dense_layers,
            "n_group": experts.num_groups,
            "topk_group": experts.topk_group,
            "norm_topk_prob": experts.is_normalised,
            "routed_scaling_factor": experts.scale,
        }
        if spec.architecture == "deepseek_v2":
            values["topk_method"] = "greedy" if experts.choice == "greedy" else "group_limited_greedy"
    return values


def _rope_scaling(spec: ModelSpec) -> dict[str, Any]:
    """`rope_scaling`, empty for a rope that isn't scaled."""
    rope = spec.rope
    if rope.scaling == "default":
        return {}
    if rope.scaling == "factors":
        rope = _llama3_of(spec)
    values: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        values |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
        factor = 1.0 if spec.latent is None else spec.latent.softmax_factor
        if factor != 1.0:  # the square of 1 + 0.1 × mscale_all_dim × ln(factor)
            values["mscale_all_dim"] = (math.sqrt(factor) - 1.0) / (0.1 * math.log(rope.factor))
    return values


def _llama3_of(spec: ModelSpec) -> RopeSpec:
    """Llama 3's scaling that gives the frequencies which a GGUF carries."""
    wanted = inverse_frequencies(spec.rope, spec.rotary_dim)
    for known in LLAMA3:
        rope = replace(known, theta=spec.rope.theta)
        if np.allclose(inverse_frequencies(rope, spec.rotary_dim), wanted, rtol=1e-4, atol=0):
            return rope
    raise UnsupportedError(
        "the GGUF's rope_freqs.weight isn't Llama 3's scaling by 8 or 32, and config.json has no other way to say it: "
        "start from the model's Hugging Face checkpoint"
    )
