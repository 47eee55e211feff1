"""What GGUF metadata of DeepSeek-V2 and V3 (`deepseek2`) says of latent attention and experts.

Keys and defaults: llama.cpp's `llama-model.cpp` and `conversion/deepseek.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.values import count, number, rope_factor, whole
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.options import Choice, ExpertOptions, LatentOptions

GGUF_NAME = "deepseek2"
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func
V3_EXPERTS, V3_GROUPS, V3_TOPK_GROUP = 256, 8, 4  # files of before October 2025 leave the groups out


def architecture_of(values: Mapping[str, Any]) -> str:
    """V2's architecture or V3's: their routers tell them apart."""
    function = count(values, "expert_gating_func", 0) or SOFTMAX
    if function not in (SOFTMAX, SIGMOID):
        raise UnsupportedError(
            f"the GGUF has expert_gating_func {function}: only 1 (softmax) and 2 (sigmoid) are supported"
        )
    return "deepseek_v3" if function == SIGMOID else "deepseek_v2"


def latent_from_gguf(values: Mapping[str, Any]) -> LatentOptions:
    """The dimensions of latent attention. Newer files have a head's under `_mla`, and the cache's without it."""
    rotary = whole(values, "rope.dimension_count")
    key = whole(values, "attention.key_length_mla", values.get("attention.key_length"))
    value = whole(values, "attention.value_length_mla", values.get("attention.value_length"))
    if key <= rotary:
        raise CheckpointError(f"a key has {key} channels, must have more than the rotary {rotary}")
    rank = count(values, "attention.q_lora_rank", 0)
    return LatentOptions(
        q_lora_rank=rank or None,
        kv_lora_rank=whole(values, "attention.kv_lora_rank"),
        qk_nope_head_dim=key - rotary,
        qk_rope_head_dim=rotary,
        v_head_dim=value,
        softmax_factor=_softmax_factor(values),
    )


def experts_from_gguf(values: Mapping[str, Any]) -> ExpertOptions:
    """The experts and their router."""
    is_v3 = architecture_of(values) == "deepseek_v3"
    num_experts = whole(values, "expert_count")
    is_grouped = is_v3 and num_experts == V3_EXPERTS
    groups = whole(values, "expert_group_count", V3_GROUPS if is_grouped else 1)
    topk_group = whole(values, "expert_group_used_count", V3_TOPK_GROUP if is_grouped and groups > 1 else groups)
    limited: Choice = "group_maximum" if groups > 1 else "greedy"
    is_normalised = bool(values.get("expert_weights_norm", False))
    width, num_shared = whole(values, "expert_feed_forward_length"), count(values, "expert_shared_count", 0)
    if count(values, "expert_shared_feed_forward_length", width * num_shared) != width * num_shared:
        raise UnsupportedError(
            f"the GGUF has expert_shared_feed_forward_length {values['expert_shared_feed_forward_length']}: only "
            f"{width * num_shared}, {num_shared} experts' {width}, is supported"
        )
    if is_normalised and not is_v3:
        raise UnsupportedError("the GGUF has expert_weights_norm true with a softmax: not supported")
    return ExpertOptions(
        num_experts=num_experts,
        num_experts_per_tok=whole(values, "expert_used_count"),
        intermediate_size=width,
        num_shared_experts=num_shared,
        first_dense_layers=count(values, "leading_dense_block_count", 0),
        scores="sigmoid" if is_v3 else "softmax",
        choice="group_top2" if is_v3 else limited,
        num_groups=groups,
        topk_group=topk_group,
        is_normalised=is_normalised,
        scale=number(values, "expert_weights_scale", 1.0) or 1.0,
    )


def _softmax_factor(values: Mapping[str, Any]) -> float:
    """The square of 1 + yarn_log_multiplier x ln(factor); the multiplier is 0.1 x mscale_all_dim.

    It holds for rope scaling of any type, as in transformers.
    """
    multiplier, factor = number(values, "rope.scaling.yarn_log_multiplier", 0.0), rope_factor(values)
    own = number(values, "rope.scaling.attn_factor", number(values, "rope.scaling.yarn_attn_factor", 1.0))
    if multiplier and own != 1.0:
        raise UnsupportedError(
            f"the GGUF has rope.scaling.attn_factor {own:g} beside a yarn_log_multiplier: only 1 is supported there"
        )
    if values.get("rope.scaling.type") == "none" or factor <= 1:
        return 1.0
    return (1.0 + multiplier * math.log(factor)) ** 2
