"""A Hugging Face `config.json` → ModelSpec: the one place that knows its naming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from deepseek_triton.builders.checkpoint.config.deepseek import V32, expert_options, latent_options
from deepseek_triton.builders.checkpoint.config.hf_rope import rope_from_hf, unused_rope_keys
from deepseek_triton.builders.checkpoint.config.known_keys import config_keys, describe_unknown
from deepseek_triton.builders.checkpoint.config.values import (
    checked_spec,
    flag,
    number,
    supported,
    token_ids,
    whole,
)
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.spec import ModelSpec

# `architectures` of models that end in something else than a language model's head.
OTHER_HEADS = ("Classification", "QuestionAnswering", "RewardModel", "Regression")


@checked_spec()
def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Hugging Face `config.json`.

    Raises:
        UnsupportedError: an architecture or option that no graph here implements.
        CheckpointError: a value that is missing or out of range.
    """
    architecture = supported(config.get("model_type"))
    config_keys(architecture).refuse(config, "config.json")
    _refuse_other_heads(config.get("architectures"))
    if (config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"config.json has hidden_act {config['hidden_act']!r}: only silu is supported")

    options = ARCHITECTURES[architecture]
    attention_bias = options.reads_attention_bias and flag(config, "attention_bias")
    num_heads, hidden_size = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    # Absent, it has the architecture's default; null, as many as q.
    default_kv_heads = num_heads if "num_key_value_heads" in config else options.default_num_kv_heads or num_heads
    max_positions = whole(config, "max_position_embeddings")
    latent = latent_options(config, num_heads) if options.is_latent else None
    head_dim = whole(config, "head_dim", options.default_head_dim or hidden_size // num_heads)
    if latent is not None:  # head_dim means the rotary part there, if it is given at all
        head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(config, "intermediate_size"),
        num_layers=whole(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=whole(config, "num_key_value_heads", default_kv_heads),
        head_dim=head_dim,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=options.qkv_bias or attention_bias,
        qk_norm=options.qk_norm,
        o_bias=attention_bias,
        mlp_bias=options.reads_mlp_bias and flag(config, "mlp_bias"),
        eos_token_ids=token_ids(_ids(config)),
        rope=rope_from_hf(config, max_positions),
        latent=latent,
        experts=expert_options(config) if options.is_latent else None,
    )
    _refuse_windows(config, spec)
    return spec


@checked_spec()
def with_ends(spec: ModelSpec, generation_config: Mapping[str, Any]) -> ModelSpec:
    """`spec` with the end tokens that `generation_config.json` names besides.

    Raises:
        CheckpointError: one is no token of the model.
    """
    return replace(spec, eos_token_ids=token_ids([*spec.eos_token_ids, *_ids(generation_config)]))


def unknown_config_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The warnings about keys of `config.json` that nothing here reads; `from_hf` has accepted it."""
    unknown = config_keys(str(config["model_type"])).unknown_keys(config)
    return (*describe_unknown("config.json", [*unknown, *unused_rope_keys(config)]), *_other_class(config))


def _other_class(config: Mapping[str, Any]) -> Iterator[str]:
    """A warning where `architectures` names the class of another model: vLLM goes by it."""
    names, model_type = config.get("architectures"), str(config["model_type"])
    for name in names if isinstance(names, list) else []:
        if not str(name).lower().startswith(model_type.replace("_", "")):
            yield (
                f"warning: config.json has architectures {name!r} beside model_type {model_type!r}: model_type counts, "
                "as in transformers"
            )


def _ids(config: Mapping[str, Any]) -> list[Any]:
    value = config.get("eos_token_id")
    return value if isinstance(value, list) else [value]


def _refuse_other_heads(names: Any) -> None:
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name.endswith(OTHER_HEADS):
            raise UnsupportedError(f"config.json has architectures {name!r}: only language models are supported")


def _refuse_windows(config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Refuse a sliding window that some layer uses and that is shorter than the model's sequences."""
    if not any(_has_window(config, spec.num_layers)):
        return
    window = whole(config, "sliding_window", 4096)  # the default of transformers' Qwen classes
    if window < spec.max_seq_len:
        raise UnsupportedError(
            f"config.json gives layers a sliding window of {window} tokens, fewer than the model's {spec.max_seq_len}: "
            "sliding windows are not supported"
        )


def _has_window(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Which layers have a sliding window: `layer_types` says it, or `use_sliding_window` with `max_window_layers`."""
    types, uses_window = config.get("layer_types"), flag(config, "use_sliding_window")
    of_indexer = "indexed_attention" if config["model_type"] == V32 else "full_attention"
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise CheckpointError(f"layer_types is {types!r:.60}, must be a list with {num_layers} entries")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention", of_indexer):
                raise UnsupportedError(f"config.json has layer_types {kind!r}: only full_attention is supported")
        return [kind == "sliding_attention" for kind in types]
    is_used = uses_window and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers")
    first = 28 if first is None else first  # the default of transformers' Qwen classes
    if not isinstance(first, int) or isinstance(first, bool):
        raise CheckpointError(f"max_window_layers is {first!r}, must be a whole number")
    return [is_used and layer >= first for layer in range(num_layers)]
