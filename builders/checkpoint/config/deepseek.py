"""What DeepSeek-V2, V3 and V3.2 add to a `config.json`: latent attention, experts, and V3.2's indexer.

Defaults and meaning: transformers' `DeepseekV2Config`, `DeepseekV3Config` and `DeepseekV32Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.hf_rope import softmax_factor
from deepseek_triton.builders.checkpoint.config.values import count, flag, number, whole
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.ensemble.decoder.options import Choice, ExpertOptions, IndexerOptions, LatentOptions

V2, V3, V32 = "deepseek_v2", "deepseek_v3", "deepseek_v32"
V2_CHOICES: dict[object, Choice] = {"greedy": "greedy", "group_limited_greedy": "group_maximum"}
# What only one value has a meaning for: key → (that of V2, that of V3), None: any.
FIXED: dict[str, tuple[object, object]] = {
    "moe_layer_freq": (1, 1),
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "norm_topk_prob": (False, None),  # transformers ignores it in V2, DeepSeek's own code doesn't
}


def latent_options(config: Mapping[str, Any], num_heads: int) -> LatentOptions:
    """The dimensions of latent attention.

    Raises:
        CheckpointError, UnsupportedError: as `from_hf`.
    """
    if whole(config, "num_key_value_heads", num_heads) != num_heads:
        raise UnsupportedError(
            f"config.json has num_key_value_heads {config['num_key_value_heads']} and num_attention_heads {num_heads}: "
            "latent attention needs as many of one as of the other"
        )
    rank = None
    if "q_lora_rank" not in config or config["q_lora_rank"] is not None:
        rank = whole(config, "q_lora_rank", 1536)
    return LatentOptions(
        q_lora_rank=rank,
        kv_lora_rank=whole(config, "kv_lora_rank", 512),
        qk_nope_head_dim=whole(config, "qk_nope_head_dim", 128),
        qk_rope_head_dim=whole(config, "qk_rope_head_dim", 64),
        v_head_dim=whole(config, "v_head_dim", 128),
        has_bias=flag(config, "attention_bias"),
        is_interleaved=config["model_type"] == V2 or flag(config, "rope_interleave", default=True),
        softmax_factor=softmax_factor(config),
        indexer=_indexer_options(config) if config["model_type"] == V32 else None,
    )


def _indexer_options(config: Mapping[str, Any]) -> IndexerOptions:
    return IndexerOptions(
        num_heads=whole(config, "index_n_heads", 64),
        head_dim=whole(config, "index_head_dim", 128),
        topk=whole(config, "index_topk", 2048),
    )


def expert_options(config: Mapping[str, Any]) -> ExpertOptions:
    """The experts and their router.

    Raises:
        CheckpointError, UnsupportedError: as `from_hf`.
    """
    is_v3 = config["model_type"] != V2
    for key, values in FIXED.items():
        value, wanted = config.get(key), values[is_v3]
        if value is not None and wanted is not None and value != wanted:
            raise UnsupportedError(f"config.json has {key} {value!r}: only {wanted!r} is supported")
    choice: Choice = "group_top2"
    if not is_v3:
        method = config.get("topk_method") or "greedy"
        if method not in V2_CHOICES:
            raise UnsupportedError(
                f"config.json has topk_method {method!r}; supported: {', '.join(map(str, V2_CHOICES))}"
            )
        choice = V2_CHOICES[method]
    is_grouped = choice != "greedy"
    if config["model_type"] == V32:
        _require_dense_first(config)
    return ExpertOptions(
        num_experts=whole(config, "n_routed_experts", 256 if is_v3 else 64),
        num_experts_per_tok=whole(config, "num_experts_per_tok", 8 if is_v3 else None),
        intermediate_size=whole(config, "moe_intermediate_size", 2048 if is_v3 else 1407),
        num_shared_experts=count(config, "n_shared_experts", 1 if is_v3 else 2),
        first_dense_layers=count(config, "first_k_dense_replace", 3 if is_v3 else 0),
        scores="sigmoid" if is_v3 else "softmax",
        choice=choice,
        num_groups=whole(config, "n_group", 8 if is_v3 else None) if is_grouped else 1,
        topk_group=whole(config, "topk_group", 4 if is_v3 else None) if is_grouped else 1,
        is_normalised=is_v3 and flag(config, "norm_topk_prob", default=True),
        scale=number(config, "routed_scaling_factor", 2.5 if is_v3 else 1.0),
    )


def _require_dense_first(config: Mapping[str, Any]) -> None:
    """`mlp_layer_types` must be what `first_k_dense_replace` says: dense layers, then experts."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return
    num_layers, dense = whole(config, "num_hidden_layers"), count(config, "first_k_dense_replace", 3)
    if kinds != ["dense"] * min(dense, num_layers) + ["sparse"] * (num_layers - dense):
        raise UnsupportedError(
            f"config.json has mlp_layer_types {kinds!r:.80}: only those of first_k_dense_replace {dense} are supported"
        )
