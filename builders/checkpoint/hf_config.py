"""A Hugging Face `config.json` → ModelSpec: the one place that knows its naming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from deepseek_triton.builders.checkpoint.config_values import checked_spec, number, supported, token_ids, whole
from deepseek_triton.builders.checkpoint.yarn import yarn_attention_factor
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.rope import RopeScaling, RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec


@checked_spec()
def from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
    """Read a Hugging Face `config.json`; `generation_config.json`, where there is one, names the end tokens.

    Raises:
        UnsupportedError: an architecture or option that no graph here implements.
        CheckpointError: a value that is missing or out of range.
    """
    architecture = supported(config.get("model_type"))
    if config.get("use_sliding_window"):
        raise UnsupportedError("config.json has use_sliding_window true: sliding windows are not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"config.json has hidden_act {config['hidden_act']!r}: only silu is supported")
    if number(config, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("config.json has partial_rotary_factor other than 1: not supported")

    options = ARCHITECTURES[architecture]
    attention_bias = options.reads_attention_bias and bool(config.get("attention_bias", False))
    num_heads, hidden_size = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    max_positions = whole(config, "max_position_embeddings")
    eos = (generation_config or {}).get("eos_token_id", config.get("eos_token_id"))
    return ModelSpec(
        architecture=architecture,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(config, "intermediate_size"),
        num_layers=whole(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=whole(config, "num_key_value_heads", num_heads),
        head_dim=whole(config, "head_dim", hidden_size // num_heads),
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=options.qkv_bias or attention_bias,
        qk_norm=options.qk_norm,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        eos_token_ids=token_ids(eos if isinstance(eos, list) else [eos]),
        rope=_rope_from_hf(config, max_positions),
    )


def _rope_from_hf(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    # transformers 5 writes rope_parameters, earlier releases rope_theta beside rope_scaling.
    parameters: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"the rope parameters are {parameters!r}, must be a JSON object")
    theta = number(parameters, "rope_theta", number(config, "rope_theta", 10000.0))
    kind: Any = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in get_args(RopeScaling) or kind == "factors":
        raise UnsupportedError(
            f"rope scaling {kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn"
        )
    if kind == "default":
        return RopeSpec(theta=theta)
    original = whole(parameters, "original_max_position_embeddings", max_positions)
    original = whole(config, "original_max_position_embeddings", original)
    # DeepSeek's yarn configurations may say the two lengths instead of their ratio.
    factor = number(parameters, "factor", max_positions / original if kind == "yarn" else None)
    if kind == "llama3":
        return RopeSpec(
            theta, kind, factor, original,
            low_freq_factor=number(parameters, "low_freq_factor"),
            high_freq_factor=number(parameters, "high_freq_factor"),
        )  # fmt: skip
    if kind == "yarn":
        return RopeSpec(
            theta, kind, factor, original,
            beta_fast=number(parameters, "beta_fast", 32.0),
            beta_slow=number(parameters, "beta_slow", 1.0),
            attention_factor=yarn_attention_factor(parameters, factor),
            truncate=bool(parameters.get("truncate", True)),
        )  # fmt: skip
    # Dynamic scaling begins where max_position_embeddings ends, whatever the original length was.
    return RopeSpec(theta, kind, factor, max_positions)
